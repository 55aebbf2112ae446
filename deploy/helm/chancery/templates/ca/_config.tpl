{{/* ca.toml */}}
{{- define "chancery.ca.toml" -}}
{{- $service := printf "chancery-ca.%s.svc" .Release.Namespace -}}
{{- $authority := deepCopy .Values.ca.config.authority -}}
{{- $names := concat (list "chancery-ca" (printf "chancery-ca.%s" .Release.Namespace) $service) .Values.ca.dnsNames -}}
{{- $_ := set $authority "dns_names" (concat $names ($authority.dns_names | default list) | uniq) -}}
# Rendered by Helm from `ca.config` and the values around it.
trust_domain = {{ .Values.trustDomain | toJson }}
# A directory of the CA's own in its volume, whose own root the kubelet opens to the pod's group.
data_dir = "/var/lib/chancery/data"
listen = {{ include "chancery.listen" (dict "root" . "port" 8443) }}
http_listen = {{ include "chancery.listen" (dict "root" . "port" 9464) }}
admin_socket = "/run/chancery/ca-admin.sock"

[keys]
{{ .Values.ca.seal.kind }}_file = {{ printf "/etc/chancery/seal/%s" .Values.ca.seal.key | toJson }}
{{- include "chancery.toml.sections" (merge (dict "authority" $authority) .Values.ca.config) }}

[[cluster]]
name = {{ .Values.cluster.name | toJson }}
issuer = {{ .Values.cluster.issuer | toJson }}
agent_accounts = [{{ printf "%s/chancery-agent" .Release.Namespace | toJson }}]
service_accounts = {{ include "chancery.toml.value" .Values.cluster.serviceAccounts }}
kubernetes = { in_cluster = true }
operators = {{ .Values.roles.create }}
{{ include "chancery.publish" (dict "namespaces" (include "chancery.trustBundle.namespaces" .) "signer" (include "chancery.trustBundle.signer" .)) }}
{{- range .Values.ca.clusters }}

[[cluster]]
name = {{ .name | toJson }}
issuer = {{ .issuer | toJson }}
agent_accounts = [{{ printf "%s/chancery-agent" $.Release.Namespace | toJson }}]
service_accounts = {{ include "chancery.toml.value" .serviceAccounts }}
shared_identities = {{ .sharedIdentities | default false }}
kubernetes = { kubeconfig = {{ printf "/etc/chancery/clusters/%s/kubeconfig" .name | toJson }}{{ with .context }}, context = {{ toJson . }}{{ end }} }
operators = {{ .operators | default false }}
{{- $bundle := .trustBundle | default dict }}
{{ include "chancery.publish" (dict "namespaces" ($bundle.namespaces | default (list $.Release.Namespace) | toJson) "signer" $bundle.signerName) }}
{{- end }}
{{- end }}

{{/* What a running CA does not take over from a changed configuration. */}}
{{- define "chancery.ca.restart" -}}
{{- list .Values.trustDomain .Values.bindAddress .Values.ca.seal .Values.ca.config.limits .Values.ca.config.log.format | toJson | sha256sum -}}
{{- end }}
