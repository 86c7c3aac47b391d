#!/usr/bin/env bash
# make_venv.sh FOLDER: a Python environment with the clients of clients_test.py, from PyPI. Fails, and leaves no folder, where
# pip cannot install them (no network).
set -euo pipefail
folder=$1
[ -e "$folder/.done" ] && exit 0
rm -rf "$folder"
if python3 -m venv "$folder" && "$folder/bin/pip" install --quiet --disable-pip-version-check \
    'tritonclient[grpc,http]' numpy grpcio-tools grpcio-reflection grpcio-health-checking; then
  touch "$folder/.done"
else
  rm -rf "$folder"
  exit 1
fi
