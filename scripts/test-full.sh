#!/usr/bin/env bash
# test-full.sh BUILD: makes the fixtures that need Debian's torch, Pillow and kernel and PyPI's onnxruntime and npm's axe-core (once per
# build folder), then runs the tests labelled `full`.
set -euo pipefail
build=$(realpath "$1")
source=$(realpath "$(dirname "$0")/..")
fixtures=$build/fixtures
python=/usr/bin/python3  # Debian's: the one that sees Debian's torch
mkdir -p "$fixtures"

# What waits for the network and for unpacking goes beside what computes.
"$source/tests/emulation/setup.sh" "$fixtures/emulation" & emulation=$!
if [ -z "${TERN_AXE:-}" ] && command -v npm >/dev/null; then
  npm install --silent --no-save --no-audit --no-fund --prefix "$fixtures/axe" axe-core@4 >/dev/null & axe=$!
fi
if [ -z "${TERN_CLIENTS_PYTHON:-}" ]; then
  "$source/tests/interop/inference/make_venv.sh" "$fixtures/clients" & clients=$!
fi
if [ -z "${TERN_ORT_PYTHON:-}" ]; then
  "$source/tests/interop/onnxruntime/make_venv.sh" "$fixtures/onnxruntime" & ort=$!
fi
if [ -z "${TERN_DEPLOY_TOOLS:-}" ]; then
  "$source/tests/deploy/make_tools.sh" "$fixtures/deploy" ${TERN_KUBE_APISERVER:+--apiserver} & deploy=$!
fi
if [ -z "${TERN_GRAFANA_PYTHON:-}" ]; then
  "$source/tests/deploy/make_venv.sh" "$fixtures/grafana" & grafana=$!
fi
if [ ! -e "$fixtures/torch/.done" ]; then
  echo "exporting torchvision's architectures with random weights (a few minutes)"
  "$python" "$source/tests/interop/torch/export_torchvision.py" "$fixtures/torch"
  touch "$fixtures/torch/.done"
fi
if [ ! -e "$fixtures/parity/.done" ]; then
  echo "preprocessing the demo photographs with Pillow and torchvision"
  "$python" "$source/tests/interop/preprocess/make_parity.py" "$source/models/demo/photos" "$fixtures/parity" --count 60
  touch "$fixtures/parity/.done"
fi
# Real networks and images, where a checkout has them beside it.
if [ -z "${TERN_SHARED_DATA:-}" ] && [ -d "$source/../shared/data" ]; then
  TERN_SHARED_DATA=$(realpath "$source/../shared/data")
  export TERN_SHARED_DATA
fi
if [ -n "${TERN_SHARED_DATA:-}" ] && [ -z "${TERN_CIFAR_DIR:-}" ] && [ -e "$TERN_SHARED_DATA/cifar10-test.tar.xz" ]; then
  if [ ! -e "$fixtures/cifar/.done" ]; then
    mkdir -p "$fixtures/cifar"
    for part in train test; do tar -xf "$TERN_SHARED_DATA/cifar10-$part.tar.xz" -C "$fixtures/cifar"; done
    touch "$fixtures/cifar/.done"
  fi
  export TERN_CIFAR_DIR=$fixtures/cifar
fi
# got JOB NAME VALUE LACK: sets the variable NAME once JOB is done, or says what is skipped because it failed. No JOB: NAME is set
# from outside, or the tool is not there.
got() {
  [ -n "$1" ] || return 0
  if wait "$1"; then export "$2=$3"; else echo "$4"; fi
}
# Environments of their own: what is in them is not in Debian.
got "$emulation" TERN_EMULATION "$fixtures/emulation" "no kernel for the emulated CPU: its test is skipped"
got "${ort:-}" TERN_ORT_PYTHON "$fixtures/onnxruntime/bin/python" "onnxruntime cannot be installed from PyPI: its tests are skipped"
got "${clients:-}" TERN_CLIENTS_PYTHON "$fixtures/clients/bin/python" "tritonclient cannot be installed from PyPI: its tests are skipped"
got "${deploy:-}" TERN_DEPLOY_TOOLS "$fixtures/deploy" \
  "helm and the API's types cannot be had as Go modules: the tests of the manifests are skipped"
got "${grafana:-}" TERN_GRAFANA_PYTHON "$fixtures/grafana/bin/python" \
  "grafana-foundation-sdk cannot be installed from PyPI: its test is skipped"
got "${axe:-}" TERN_AXE "$fixtures/axe/node_modules/axe-core/axe.min.js" \
  "axe-core cannot be installed from npm: its check of the status page is skipped"
export TERN_TORCH_FIXTURES=$fixtures/torch TERN_PARITY_FIXTURES=$fixtures/parity
# The longest start first (COST), so that the others run beside them.
ctest --test-dir "$build" --output-on-failure -j "$(nproc)" -L full
