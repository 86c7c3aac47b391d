#!/usr/bin/env bash
# make_tools.sh FOLDER: what tests/deploy/manifests_test.py checks manifests with, from Go modules: FOLDER/bin/helm,
# FOLDER/bin/kubeconform, for compose_checks.py FOLDER/bin/compose (reads a compose file as compose does), and in FOLDER/apis Kubernetes' OpenAPI document and the definitions of the custom resources.
#   make_tools.sh FOLDER --apiserver    also FOLDER/bin/kube-apiserver: a quarter of an hour of processor time, once
# Needs go. Repeating it is cheap.
set -euo pipefail
folder=$(mkdir -p "$1" && realpath "$1")
kubernetes=v1.35.4 # manifests.py names it too
helm=v3.22.0
command -v go >/dev/null || { echo "go is not installed" >&2; exit 1; }
export GOBIN=$folder/bin GOFLAGS=-buildvcs=false
jobs=${JOBS:-1}

# Where the module proxy unpacked it.
module() {
  go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'
}

minor=${kubernetes#v1.}
chartutil=helm.sh/helm/v3/pkg/chartutil
[ -x "$GOBIN/helm" ] || go install -p "$jobs" \
  -ldflags "-s -w -X $chartutil.k8sVersionMajor=1 -X $chartutil.k8sVersionMinor=${minor%%.*}" \
  "helm.sh/helm/v3/cmd/helm@$helm"
[ -x "$GOBIN/kubeconform" ] || go install -p "$jobs" -ldflags "-s -w" github.com/yannh/kubeconform/cmd/kubeconform@v0.7.0
if [ ! -x "$GOBIN/compose" ]; then
  go install -p "$jobs" -ldflags "-s -w" github.com/compose-spec/compose-go/v2/cmd@v2.16.2
  mv "$GOBIN/cmd" "$GOBIN/compose"
fi

if [ ! -e "$folder/apis/.done" ]; then
  mkdir -p "$folder/apis"
  source=$(module "k8s.io/kubernetes@$kubernetes")
  keda=$(module github.com/kedacore/keda/v2@v2.18.1)
  operator=$(module github.com/prometheus-operator/prometheus-operator@v0.92.1)
  kserve=$(module github.com/kserve/kserve@v0.16.0)
  install -m 644 "$source/api/openapi-spec/swagger.json" \
    "$keda/config/crd/bases/keda.sh_scaledobjects.yaml" \
    "$operator/example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml" \
    "$operator/example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml" \
    "$kserve/config/crd/full/serving.kserve.io_clusterservingruntimes.yaml" \
    "$kserve/config/crd/full/serving.kserve.io_inferenceservices.yaml" \
    "$folder/apis/"
  touch "$folder/apis/.done"
fi

if [ "${2:-}" = --apiserver ] && [ ! -x "$GOBIN/kube-apiserver" ]; then
  version=k8s.io/component-base/version
  # The module lacks its nested modules, which are published with the same number.
  work=$folder/kubernetes
  rm -rf "$work"
  cp -r "$(module "k8s.io/kubernetes@$kubernetes")" "$work"
  chmod -R u+w "$work"
  rm -rf "$work/vendor" "$work"/go.work*
  nested=$(sed -n 's|^\t\(k8s.io/[a-z-]*\) => ./staging/.*|\1|p' "$work/go.mod")
  sed -i '\|=> ./staging/|d' "$work/go.mod"
  for name in $nested; do
    sed -i "s|^\(\t$name\) v0.0.0\b|\1 ${kubernetes/v1./v0.}|" "$work/go.mod"
  done
  (cd "$work" && GOWORK=off GOFLAGS="-mod=mod -buildvcs=false" \
    go build -p "$jobs" -trimpath -ldflags "-s -w -X $version.gitVersion=$kubernetes -X $version.gitMajor=1 \
      -X $version.gitMinor=${minor%%.*}" -o "$GOBIN/kube-apiserver" ./cmd/kube-apiserver)
  rm -rf "$work"
fi
