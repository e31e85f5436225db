{{- /* A probe of Triton's HTTP health. With TLS HTTP answers on the pod's loopback alone, so it is asked from inside. */ -}}
{{- define "minitron.health" -}}
{{- $top := index . 0 -}}{{- $path := index . 1 -}}
{{- if not $top.Values.security.tritonTls.secret -}}
httpGet: {path: {{ $path }}, port: http}
{{- else if include "minitron.isGpu" $top -}}
exec:
  command: [curl, --noproxy, "*", --fail, --silent, --max-time, "4", "http://127.0.0.1:8000{{ $path }}"]
{{- else -}}
exec:
  command: [python3, -c, "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000{{ $path }}', timeout=4)"]
{{- end -}}
{{- end -}}

{{- define "minitron.probes" -}}
{{- /* Until the first success nothing but time is judged: that is loading. What cannot load ends the container by itself. */ -}}
startupProbe:
  {{- include "minitron.health" (list . "/v2/health/ready") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add .Values.triton.readyTimeoutSeconds 4) 5 }}
readinessProbe:
  {{- include "minitron.health" (list . "/v2/health/ready") | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- /* A minute of silence is broken: a busy server answers its health within seconds. */}}
livenessProbe:
  {{- include "minitron.health" (list . "/v2/health/live") | nindent 2 }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{- /* TLS and keys as flags of tritonserver; only the first rank opens ports. The keys are read from files by the shell. */ -}}
{{- define "minitron.tritonSecrets" -}}
{{- $tls := .Values.security.tritonTls -}}
{{- if $tls.secret }} \
  --grpc-use-ssl=true --grpc-server-cert=/secrets/tls/tls.crt --grpc-server-key=/secrets/tls/tls.key
{{- if $tls.mutual }} \
  --grpc-use-ssl-mutual=true --grpc-root-cert=/secrets/tls/ca.crt
{{- end }}
{{- end }}
{{- $admin := join "," .Values.engine.adminInterfaces }}
{{- $user := join "," .Values.engine.userInterfaces }} \
  "--grpc-restricted-protocol={{ $admin }}:server-key=$server_key"
{{- if .Values.security.tritonApiKey.secret }} \
  "--grpc-restricted-protocol={{ $user }}:api-key=$(cat /secrets/api-key/api-key)"
{{- end }}
{{- if $tls.secret }} \
  "--http-restricted-api={{ $admin }},{{ $user }}:server-key=$server_key"
{{- else }} \
  "--http-restricted-api={{ $admin }}:server-key=$server_key"
{{- if .Values.security.tritonApiKey.secret }} \
  "--http-restricted-api={{ $user }}:api-key=$(cat /secrets/api-key/api-key)"
{{- end }}
{{- end }}
{{- end -}}

{{- /* The port of a URL. */ -}}
{{- define "minitron.collectorPort" -}}
{{- $url := urlParse . -}}
{{- regexFind "[0-9]+$" $url.host | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}

{{- /* The flags that 'minitron serve' gives where OTEL_EXPORTER_OTLP_ENDPOINT names a collector. */ -}}
{{- define "minitron.traceFlags" -}}
{{- $flags := list -}}
{{- with .Values.tracing }}
{{- if .endpoint }}
{{- range list "mode=opentelemetry" "level=TIMESTAMPS" (printf "rate=%d" (int .rate)) (printf "opentelemetry,url=%s/v1/traces" (trimSuffix "/" .endpoint)) "opentelemetry,resource=service.name=minitron-triton" "opentelemetry,bsp_schedule_delay=1000" }}
{{- $flags = append $flags (printf "--trace-config=%s" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- $flags | toJson -}}
{{- end -}}

{{- define "minitron.tritonCommand" -}}
{{- $top := . -}}
{{- $http := ternary "127.0.0.1" "0.0.0.0" (ne .Values.security.tritonTls.secret "") -}}
{{- if include "minitron.isGpu" . -}}
command: [/bin/sh, -ec]
args:
  - |
    # As far as the node's own limits allow: pinned memory, and the stack that NVIDIA's documentation asks for.
    ulimit -S -l "$(ulimit -H -l)" || true
    ulimit -S -s 65536 || true
    server_key=$(od -An -N18 -tx1 /dev/urandom | tr -d ' \n')
    {{- $many := gt (len .Values.engine.ranks) 1 }}
    {{- range $rank, $flags := .Values.engine.ranks }}
    {{- $start := ternary "exec " "" (eq $rank 0) }}
    {{- if $many }}{{ $start = ternary "exec mpirun --allow-run-as-root -n 1 " "  : -n 1 " (eq $rank 0) }}{{ end }}
    {{ $start }}tritonserver
    {{- range $flags }} \
      {{ . | squote }}
    {{- end }} \
      --http-address={{ $http }}
    {{- range include "minitron.traceFlags" $top | fromJsonArray }} \
      {{ . | squote }}
    {{- end }}
    {{- if eq $rank 0 }}{{ include "minitron.tritonSecrets" $top | nindent 4 | trim | printf " %s" }}{{ end }}
    {{- if lt (add1 $rank) (len $top.Values.engine.ranks) }} \{{ end }}
    {{- end }}
{{- else -}}
command: [minitron, serve]
args:
  - {{ .Values.engine.path }}
  - --host=0.0.0.0
  - --grpc-port=8001
  - --http-port=8000
  - --metrics-port=8002
  - --metrics-host=0.0.0.0
  - --state=/run/minitron
  - --exit-timeout={{ .Values.triton.exitTimeoutSeconds }}
  - --ready-timeout={{ .Values.triton.readyTimeoutSeconds }}
  # The kubelet starts it again, and counts.
  - --restarts=0
  {{- if .Values.tracing.rate }}
  - --trace-rate={{ .Values.tracing.rate }}
  {{- end }}
  {{- if .Values.security.tritonTls.secret }}
  - --tls-cert=/secrets/tls/tls.crt
  - --tls-key=/secrets/tls/tls.key
  {{- if .Values.security.tritonTls.mutual }}
  - --tls-ca=/secrets/tls/ca.crt
  {{- end }}
  {{- end }}
  {{- if .Values.security.tritonApiKey.secret }}
  - --api-key-file=/secrets/api-key/api-key
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "minitron.tritonContainer" -}}
{{- $image := ternary .Values.images.triton .Values.images.toolkit (eq (include "minitron.isGpu" .) "true") -}}
{{- $tls := .Values.security.tritonTls -}}
image: {{ include "minitron.image" $image }}
imagePullPolicy: {{ $image.pullPolicy }}
{{ include "minitron.tritonCommand" . }}
env:
  {{- include "minitron.scratchEnv" . | nindent 2 }}
  {{- if include "minitron.isGpu" . }}
  # How the text model calls its own server.
  - {name: MINITRON_GRPC, value: "127.0.0.1:8001"}
  {{- if $tls.secret }}
  - {name: MINITRON_GRPC_CA, value: /secrets/tls/tls.crt}
  - {name: MINITRON_GRPC_AUTHORITY, value: {{ include "minitron.tritonAuthority" . }}}
  {{- if $tls.mutual }}
  - {name: MINITRON_GRPC_CERT, value: /secrets/tls/tls.crt}
  - {name: MINITRON_GRPC_KEY, value: /secrets/tls/tls.key}
  {{- end }}
  {{- end }}
  {{- if .Values.security.tritonApiKey.secret }}
  - {name: MINITRON_GRPC_API_KEY_FILE, value: /secrets/api-key/api-key}
  {{- end }}
  {{- end }}
  {{- if and .Values.tracing.endpoint (not (include "minitron.isGpu" .)) }}
  - {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .Values.tracing.endpoint | quote }}}
  {{- end }}
  {{- range $name, $value := .Values.triton.env }}
  - {name: {{ $name }}, value: {{ $value | quote }}}
  {{- end }}
ports:
  - {name: http, containerPort: 8000}
  - {name: grpc, containerPort: 8001}
  - {name: metrics, containerPort: 8002}
{{ include "minitron.probes" . }}
lifecycle:
  preStop:
    # Still serving, while whoever reads the DNS stops to send requests here.
    exec: {command: [sleep, {{ .Values.triton.drainDelaySeconds | quote }}]}
securityContext:
  {{- include "minitron.containerSecurity" . | nindent 2 }}
resources:
  requests:
    {{- toYaml .Values.triton.resources.requests | nindent 4 }}
  limits:
    {{- toYaml .Values.triton.resources.limits | nindent 4 }}
    {{- if .Values.triton.gpu.count }}
    {{ .Values.triton.gpu.resource }}: {{ .Values.triton.gpu.count }}
    {{- end }}
volumeMounts:
  {{- include "minitron.storeMount" . | nindent 2 }}
  - {name: tmp, mountPath: /tmp}
  - {name: state, mountPath: /run/minitron}
  - {name: shm, mountPath: /dev/shm}
  {{- if $tls.secret }}
  - {name: tls, mountPath: /secrets/tls, readOnly: true}
  {{- end }}
  {{- if .Values.security.tritonApiKey.secret }}
  - {name: api-key, mountPath: /secrets/api-key, readOnly: true}
  {{- end }}
{{- end -}}

{{- /* The name in the servers' certificate. */ -}}
{{- define "minitron.tritonAuthority" -}}
{{- .Values.security.tritonTls.authority | default (printf "%s-triton.%s.svc" (include "minitron.name" .) .Release.Namespace) -}}
{{- end -}}

{{- define "minitron.tritonInit" -}}
{{- if eq .Values.store.kind "claim" }}
- name: await-repository
  image: {{ include "minitron.image" .Values.images.toolkit }}
  imagePullPolicy: {{ .Values.images.toolkit.pullPolicy }}
  # Written last and in one step, by the Job {{ include "minitron.name" . }}-build-{{ include "minitron.key" . }}.
  command: [/bin/sh, -ec, "until [ -s /store/{{ include "minitron.key" . }}/repository/manifest.json ]; do sleep 2; done"]
  securityContext:
    {{- include "minitron.containerSecurity" . | nindent 4 }}
  resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {memory: 32Mi}}
  volumeMounts:
    - {name: store, mountPath: /store, readOnly: true}
{{- else if eq .Values.store.kind "init" }}
- {{ include "minitron.buildContainer" . | nindent 2 | trim }}
{{- end }}
{{- end -}}

{{- define "minitron.tritonVolumes" -}}
{{ include "minitron.storeVolume" . }}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
- name: state
  emptyDir: {sizeLimit: 1Gi}
- name: shm
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.triton.shmBytes | int64 | quote }}}
{{- if eq .Values.store.kind "init" }}
{{ include "minitron.buildVolumes" . }}
{{- end }}
{{- if .Values.security.tritonTls.secret }}
- name: tls
  secret: {secretName: {{ .Values.security.tritonTls.secret }}, defaultMode: 0440}
{{- end }}
{{- if .Values.security.tritonApiKey.secret }}
- name: api-key
  secret: {secretName: {{ .Values.security.tritonApiKey.secret }}, defaultMode: 0440}
{{- end }}
{{- end -}}

{{- /* Everything of a Triton pod but its main container. */ -}}
{{- define "minitron.tritonPod" -}}
serviceAccountName: {{ include "minitron.name" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "minitron.tritonGrace" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "minitron.podSecurity" . | nindent 2 }}
{{- if ne .Values.store.kind "image" }}
initContainers:
  {{- include "minitron.tritonInit" . | trim | nindent 2 }}
{{- end }}
volumes:
  {{- include "minitron.tritonVolumes" . | nindent 2 }}
{{- with .Values.triton.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .Values.triton.tolerations }}
{{- if .Values.triton.gpu.count }}
{{- $tolerations = append $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.triton.affinity .Values.triton.gpu.products }}
affinity:
  {{- if .Values.triton.affinity }}
  {{- toYaml .Values.triton.affinity | nindent 2 }}
  {{- else }}
  {{- include "minitron.gpuNodes" . | trim | nindent 2 }}
  {{- end }}
{{- end }}
{{- if .Values.triton.spread }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "minitron.selector" . | nindent 8 }}
        app.kubernetes.io/component: triton
{{- end }}
{{- end -}}
