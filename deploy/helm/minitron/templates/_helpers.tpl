{{- define "minitron.name" -}}
{{- .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "minitron.selector" -}}
app.kubernetes.io/name: minitron
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "minitron.labels" -}}
{{ include "minitron.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "minitron.image" -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag }}{{ end }}
{{- end -}}

{{- /* The engine's key as a folder and part of a name. */ -}}
{{- define "minitron.key" -}}
{{- .Values.engine.key | default "unkeyed" | trunc 12 -}}
{{- end -}}

{{- define "minitron.isGpu" -}}
{{- if .Values.engine.ranks }}true{{ end -}}
{{- end -}}

{{- /* Where a container sees what was built; an OCI image holds the repository alone. */ -}}
{{- define "minitron.claimName" -}}
{{- .Values.store.claim.existing | default (printf "%s-store" (include "minitron.name" .)) -}}
{{- end -}}

{{- define "minitron.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.security.runAsUser }}
runAsGroup: {{ .Values.security.runAsUser }}
fsGroup: {{ .Values.security.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "minitron.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- /* HOME and caches on a disk that can be written. */ -}}
{{- define "minitron.scratchEnv" -}}
- {name: HOME, value: /tmp}
- {name: XDG_CACHE_HOME, value: /tmp/cache}
- {name: HF_HOME, value: /tmp/huggingface}
{{- end -}}

{{- /* The volume of the store. */ -}}
{{- define "minitron.storeVolume" -}}
- name: store
{{- if eq .Values.store.kind "claim" }}
  persistentVolumeClaim: {claimName: {{ include "minitron.claimName" . }}}
{{- else if eq .Values.store.kind "image" }}
  image: {reference: {{ required "store.image.reference names the OCI image that holds the repository" .Values.store.image.reference }}, pullPolicy: {{ .Values.store.image.pullPolicy }}}
{{- else }}
  emptyDir: {sizeLimit: {{ .Values.store.init.size }}}
{{- end }}
{{- end -}}

{{- /* How the serving containers see it: read-only. */ -}}
{{- define "minitron.storeMount" -}}
- name: store
  readOnly: true
{{- if eq .Values.store.kind "image" }}
  mountPath: {{ .Values.engine.path }}
{{- else if include "minitron.isGpu" . }}
  mountPath: {{ .Values.engine.path }}
  subPath: {{ include "minitron.key" . }}/repository
{{- else }}
  mountPath: /store
{{- end }}
{{- end -}}

{{- /* Seconds after SIGTERM in which the last stream has ended and the container with it: Triton unloads a model a second. */ -}}
{{- define "minitron.tritonGrace" -}}
{{- add .Values.triton.drainDelaySeconds .Values.triton.exitTimeoutSeconds 20 -}}
{{- end -}}

{{- /* Build what is missing: the Job's container, and the init container of store.kind init. */ -}}
{{- define "minitron.buildContainer" -}}
{{- $image := ternary .Values.images.builder .Values.images.toolkit (eq (include "minitron.isGpu" .) "true") -}}
name: build
image: {{ include "minitron.image" $image }}
imagePullPolicy: {{ $image.pullPolicy }}
command: [/bin/sh, -ec]
args:
  - |
    if [ -r /secrets/huggingface/token ]; then HF_TOKEN=$(cat /secrets/huggingface/token); export HF_TOKEN; fi
    minitron up --output /store/{{ include "minitron.key" . }} --recipe /recipe/recipe.yaml --model {{ .Values.model.source | squote }}
    {{- if .Values.engine.key }}
    grep -q '"digest": "{{ .Values.engine.key }}' /store/{{ include "minitron.key" . }}/engine/manifest.json || {
      echo "what was built has another digest than {{ include "minitron.key" . }}: render the values from this engine" >&2; exit 3; }
    {{- end }}
env:
  {{- include "minitron.scratchEnv" . | nindent 2 }}
securityContext:
  {{- include "minitron.containerSecurity" . | nindent 2 }}
resources:
  requests:
    {{- toYaml .Values.build.resources.requests | nindent 4 }}
  limits:
    {{- toYaml .Values.build.resources.limits | nindent 4 }}
    {{- if .Values.triton.gpu.count }}
    {{ .Values.triton.gpu.resource }}: {{ .Values.triton.gpu.count }}
    {{- end }}
volumeMounts:
  - {name: store, mountPath: /store}
  - {name: recipe, mountPath: /recipe, readOnly: true}
  - {name: tmp, mountPath: /tmp}
  {{- if .Values.model.tokenSecret }}
  - {name: huggingface, mountPath: /secrets/huggingface, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "minitron.buildVolumes" -}}
- name: recipe
  configMap: {name: {{ include "minitron.name" . }}-recipe}
{{- if .Values.model.tokenSecret }}
- name: huggingface
  secret: {secretName: {{ .Values.model.tokenSecret }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- define "minitron.gpuNodes" -}}
{{- if .Values.triton.gpu.products }}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
      - matchExpressions:
          - {key: nvidia.com/gpu.product, operator: In, values: {{ .Values.triton.gpu.products | toJson }}}
{{- end }}
{{- end -}}
