{{/* What a schema cannot say: values that contradict each other. Each message names what to change. */}}
{{- define "tern.validate" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "tern.fullname" .)) }}
{{- fail (printf "%s cannot be the name of a Service (a letter first, then letters, digits and -): set fullnameOverride." (include "tern.fullname" .)) }}
{{- end }}
{{- if has (int .Values.metrics.port) (list 8500 8501 8503) }}
{{- fail (printf "metrics.port is %v: in the pod 8500, 8501 and 8503 are the ports for data, administration and health." .Values.metrics.port) }}
{{- end }}
{{- range $label, $_ := .Values.podLabels }}
{{- if hasKey (include "tern.labels" $ | fromYaml) $label }}
{{- fail (printf "podLabels: %s is the chart's to set: services and the Deployment find the pods by their labels." $label) }}
{{- end }}
{{- end }}
{{- if and .Values.metrics.annotations (not .Values.metrics.serviceMonitor.enabled) }}
{{- range $annotation, $_ := .Values.podAnnotations }}
{{- if hasPrefix "prometheus.io/" $annotation }}
{{- fail (printf "podAnnotations: %s is the chart's to set, unless metrics.annotations is false." $annotation) }}
{{- end }}
{{- end }}
{{- end }}
{{- $repository := .Values.repository }}
{{- $sources := list }}
{{- if $repository.source.claim }}{{ $sources = append $sources "repository.source.claim" }}{{ end }}
{{- if $repository.source.image.reference }}{{ $sources = append $sources "repository.source.image.reference" }}{{ end }}
{{- if $repository.source.archive.url }}{{ $sources = append $sources "repository.source.archive.url" }}{{ end }}
{{- if gt (len $sources) 1 }}
{{- fail (printf "%s exclude each other: a repository comes from one place." (join ", " $sources)) }}
{{- end }}
{{- if $repository.persistence.enabled }}
{{- if or .Values.autoscaling.enabled (gt (int .Values.replicaCount) 1) }}
{{- fail "repository.persistence.enabled is for one replica: a repository is locked by the server that uses it. Use repository.source for several." }}
{{- end }}
{{- if $sources }}
{{- fail (printf "repository.persistence.enabled and %s exclude each other." (first $sources)) }}
{{- end }}
{{- else if or $repository.persistence.existingClaim $repository.persistence.storageClass }}
{{- fail "repository.persistence.existingClaim and .storageClass say nothing without repository.persistence.enabled." }}
{{- end }}
{{- if eq $repository.source.mode "mount" }}
{{- if not (or $repository.source.claim $repository.source.image.reference) }}
{{- fail "repository.source.mode mount wants repository.source.claim or repository.source.image.reference." }}
{{- end }}
{{- if and $repository.source.image.reference (eq $repository.source.image.as "container") }}
{{- fail "repository.source.mode mount wants repository.source.image.as volume: a container can only copy." }}
{{- end }}
{{- if .Values.server.demo }}
{{- fail "server.demo writes into the repository, repository.source.mode mount forbids it." }}
{{- end }}
{{- end }}
{{- if ne (empty $repository.source.archive.url) (empty $repository.source.archive.sha256) }}
{{- fail "repository.source.archive wants url and sha256: nothing is served that was not checked." }}
{{- end }}
{{- if and $repository.source.image.reference (eq $repository.source.image.as "volume") (semverCompare "<1.31.0-0" .Capabilities.KubeVersion.Version) }}
{{- fail (printf "repository.source.image.as: Kubernetes %s has no image volumes (1.31 or later has); use container." .Capabilities.KubeVersion.Version) }}
{{- end }}
{{- if .Values.admin.service.enabled }}
{{- if not (or .Values.auth.adminTokensSecret .Values.tls.clientCertificates) }}
{{- fail "admin.service.enabled lets the cluster reach the admin port, where models are replaced and deleted: set auth.adminTokensSecret or tls.clientCertificates." }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.adminFrom) }}
{{- fail "admin.service.enabled: nobody can reach it, because networkPolicy.adminFrom is empty." }}
{{- end }}
{{- else if .Values.networkPolicy.adminFrom }}
{{- fail "networkPolicy.adminFrom says nothing without admin.service.enabled: the admin port is on the pod's loopback." }}
{{- end }}
{{- if and .Values.networkPolicy.enabled .Values.networkPolicy.dataFrom (not .Values.networkPolicy.metricsFrom) }}
{{- fail "networkPolicy.dataFrom without networkPolicy.metricsFrom: everyone could still classify, with /v2 on the metrics port. Set both." }}
{{- end }}
{{- if and (not .Values.tls.secret) (or .Values.tls.clientCertificates .Values.tls.serverName) }}
{{- fail "tls.clientCertificates and tls.serverName need tls.secret, with the keys tls.crt, tls.key and ca.crt." }}
{{- end }}
{{- if .Values.autoscaling.enabled }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail (printf "autoscaling.minReplicas is %v, more than maxReplicas, %v." .Values.autoscaling.minReplicas .Values.autoscaling.maxReplicas) }}
{{- end }}
{{- if not (or .Values.autoscaling.queueWaitMilliseconds .Values.autoscaling.imagesPerWorker .Values.autoscaling.cpuUtilizationPercent) }}
{{- fail "autoscaling wants one of queueWaitMilliseconds, imagesPerWorker and cpuUtilizationPercent, all are 0." }}
{{- end }}
{{- if and (eq .Values.autoscaling.type "keda") (not .Values.autoscaling.prometheusAddress) (or .Values.autoscaling.queueWaitMilliseconds .Values.autoscaling.imagesPerWorker) }}
{{- fail "autoscaling.type keda asks Prometheus: set autoscaling.prometheusAddress." }}
{{- end }}
{{- end }}
{{- range .Values.server.extraArgs }}
{{- if regexMatch "^--(repository|host|port|admin_host|admin_port|metrics_host|metrics_port|health_port|tls_cert|tls_key|tls_client_ca|admin_token_file|data_token_file|max_isa|threads|log_level|log_format|max_image_bytes|max_pixels|drain|grace|demo|read_only|poll_interval|ports_file)(=|$)" . }}
{{- fail (printf "server.extraArgs: %s is the chart's to set; README.md names the value." .) }}
{{- end }}
{{- end }}
{{- end }}
