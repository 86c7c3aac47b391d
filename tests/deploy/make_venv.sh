#!/usr/bin/env bash
# make_venv.sh FOLDER: a Python environment with Grafana's types of its dashboards (grafana-foundation-sdk, from PyPI), for
# grafana_test.py. Fails, and leaves no folder, where pip cannot install it (no network).
set -euo pipefail
folder=$1
[ -e "$folder/.done" ] && exit 0
rm -rf "$folder"
if python3 -m venv "$folder" && "$folder/bin/pip" install --quiet --disable-pip-version-check grafana-foundation-sdk; then
  touch "$folder/.done"
else
  rm -rf "$folder"
  exit 1
fi
