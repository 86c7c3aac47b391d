#!/usr/bin/env bash
# make_venv.sh FOLDER [PACKAGES...]: a Python environment with onnxruntime, onnx and numpy from PyPI, for onnxruntime_test.py,
# and with more packages for bench/compare_peers.py. Fails, and leaves no folder, where pip cannot install them (no network).
set -euo pipefail
folder=$1
shift
[ -e "$folder/.done" ] && exit 0
rm -rf "$folder"
if python3 -m venv "$folder" && "$folder/bin/pip" install --quiet --disable-pip-version-check onnxruntime onnx numpy "$@"; then
  touch "$folder/.done"
else
  rm -rf "$folder"
  exit 1
fi
