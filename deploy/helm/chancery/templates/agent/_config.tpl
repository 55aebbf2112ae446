{{/* agent.toml */}}
{{- define "chancery.agent.toml" -}}
{{- $config := .Values.agent.config -}}
{{- if not (or .Values.ca.enabled .Values.agent.caAddress) }}{{ fail "ca.enabled=false needs agent.caAddress: host:port of the CA" }}{{ end -}}
# Rendered by Helm from `agent.config` and the values around it.
trust_domain = {{ .Values.trustDomain | toJson }}
cluster = {{ .Values.cluster.name | toJson }}
ca_address = {{ .Values.agent.caAddress | default (printf "chancery-ca.%s.svc:8443" .Release.Namespace) | toJson }}
token_file = "/var/run/secrets/chancery/token"
key_type = {{ $config.key_type | toJson }}
state_dir = "/run/chancery/state"
allow_disk_state = {{ .Values.agent.allowDiskState }}
http_listen = {{ include "chancery.listen" (dict "root" . "port" 9465) }}
admin_socket = "/run/chancery/agent-admin.sock"

[trust]
{{- if .Values.agent.rootFingerprint }}
root_fingerprint = {{ .Values.agent.rootFingerprint | toJson }}
{{- else }}
bundle_file = "/etc/chancery/trust/trust-bundle.pem"
{{- end }}

# Pods have sockets of their own. This one is for root on the node.
[sds]
socket = "/run/chancery/sds.sock"
socket_mode = 0o600

[csi]
driver = "csi.chancery.dev"
plugin_dir = {{ printf "%s/plugins/csi.chancery.dev" .Values.agent.kubeletDir | toJson }}
registry_dir = {{ printf "%s/plugins_registry" .Values.agent.kubeletDir | toJson }}
socket_root = "/run/chancery/pods"
audience = "chancery"
{{- include "chancery.toml.sections" (omit $config "key_type") }}
{{- end }}
