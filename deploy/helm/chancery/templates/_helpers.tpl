{{/* Labels of everything; the argument is a dict of root and name, which is one of chancery-ca, chancery-agent, chancery. */}}
{{- define "chancery.labels" -}}
{{ include "chancery.selector" . }}
app.kubernetes.io/part-of: chancery
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* What selects the pods of one component; it can never change. */}}
{{- define "chancery.selector" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}

{{/* A component's image; the argument is a dict of root, name and digest. */}}
{{- define "chancery.image" -}}
{{- $image := .root.Values.image -}}
{{- $path := .name -}}
{{- if $image.registry }}{{ $path = printf "%s/%s" (trimSuffix "/" $image.registry) .name }}{{ end -}}
{{- if .digest -}}
{{ printf "%s@%s" $path .digest }}
{{- else -}}
{{ printf "%s:%s" $path ($image.tag | default .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* A value as TOML, on one line: strings, numbers and booleans are written as in JSON, maps as inline tables. */}}
{{- define "chancery.toml.value" -}}
{{- if kindIs "map" . -}}
{ {{- range $index, $key := keys . | sortAlpha }}{{ if $index }},{{ end }} {{ $key }} = {{ include "chancery.toml.value" (get $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{- range $index, $value := . }}{{ if $index }}, {{ end }}{{ include "chancery.toml.value" $value }}{{ end }}]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* The keys of a map as lines of TOML. */}}
{{- define "chancery.toml.lines" -}}
{{- range $key, $value := . }}
{{ $key }} = {{ include "chancery.toml.value" $value }}
{{- end }}
{{- end }}

{{/* Sections of TOML, from a map of maps; empty ones are left out. */}}
{{- define "chancery.toml.sections" -}}
{{- range $name, $section := . }}
{{- if $section }}

[{{ $name }}]
{{- include "chancery.toml.lines" $section }}
{{- end }}
{{- end }}
{{- end }}

{{/* host:port with the brackets that an IPv6 address has already. */}}
{{- define "chancery.listen" -}}
{{ printf "%s:%d" .root.Values.bindAddress (int .port) | toJson }}
{{- end }}

{{- define "chancery.seal.secret" -}}
{{ .Values.ca.seal.existingSecret | default "chancery-ca-seal" }}
{{- end }}

{{/* The signer of the ClusterTrustBundle; empty where there is none. */}}
{{- define "chancery.trustBundle.signer" -}}
{{- $is_there := or (semverCompare ">=1.37.0-0" .Capabilities.KubeVersion.Version) (.Capabilities.APIVersions.Has "certificates.k8s.io/v1beta1/ClusterTrustBundle") -}}
{{- if $is_there }}{{ .Values.trustBundle.signerName }}{{ end -}}
{{- end }}

{{/* What the CA publishes in a cluster, as TOML; the argument is a dict of namespaces (a JSON list) and signer. */}}
{{- define "chancery.publish" -}}
publish = { namespaces = {{ .namespaces }}{{ with .signer }}, signer_name = {{ toJson . }}{{ end }} }
{{- end }}

{{/* Namespaces that get the ConfigMap with the trust bundle, as a JSON list. */}}
{{- define "chancery.trustBundle.namespaces" -}}
{{ prepend .Values.trustBundle.namespaces .Release.Namespace | uniq | toJson }}
{{- end }}
