#!/usr/bin/env bash
# demo.sh BUILD [--keep]: the main job on real photographs. Starts ternd with the embedded demo model on free
# loopback ports, quantises it four ways over gRPC, classifies the shipped photographs with every version
# and prints the comparison and a few metrics. Leaves nothing behind, unless --keep.
set -euo pipefail
build=$(realpath "$1")
keep=${2:-}
source=$(realpath "$(dirname "$0")/..")
ternd=$build/bin/ternd
ternctl=$build/bin/ternctl
photos=$source/models/demo/photos
calibration=$source/models/demo/calibration
work=$(mktemp -d "${TMPDIR:-/tmp}/tern-demo.XXXXXX")
server=

stop() {
  if [ -n "$server" ] && kill -0 "$server" 2>/dev/null; then
    kill -TERM "$server"
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap stop EXIT
trap 'exit 130' INT TERM

step() { printf '\n== %s\n' "$*"; }

step "Starting ternd with the embedded demo model"
"$ternd" --repository "$work/models" --demo --host 127.0.0.1 --admin_host 127.0.0.1 --metrics_host 127.0.0.1 \
  --port 0 --admin_port 0 --metrics_port 0 --ports_file "$work/ports.json" >"$work/ternd.log" 2>&1 &
server=$!
for _ in $(seq 300); do
  [ -e "$work/ports.json" ] && break
  kill -0 "$server" 2>/dev/null || { cat "$work/ternd.log"; server=; exit 1; }
  sleep 0.1
done
[ -e "$work/ports.json" ] || { echo "ternd did not get ready within 30 s"; cat "$work/ternd.log"; exit 1; }
port_of() { sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p" "$work/ports.json"; }
export TERN_SERVER=127.0.0.1:$(port_of port) TERN_ADMIN=127.0.0.1:$(port_of admin_port)
metrics=http://127.0.0.1:$(port_of metrics_port)/metrics
grep -E 'CPU budget|ready' "$work/ternd.log"

quantize() {
  step "Quantising: $*"
  "$ternctl" quantize --model demo --from 1 "$@" --calibration "$calibration" --evaluation "$photos" --seed 0 \
    | sed -n "/^WHOLE MODEL/,\$p" # the per-layer table: ternctl report
}
quantize --weights int8
quantize --weights int4 --cluster 16
quantize --weights ternary --cluster 4
quantize --weights ternary --cluster 64

step "One photograph, version 4 (ternary, N=4)"
"$ternctl" classify --model demo --version 4 --top-k 3 "$(find "$photos" -name '*.jpg' | sort | sed -n 1p)"

step "Every version on the shipped photographs, over gRPC"
"$ternctl" compare --model demo --data "$photos" --seconds 2

step "Some of the metrics ($metrics)"
"$ternctl" classify --model demo "$photos" --send-labels >/dev/null
curl -fsS "$metrics" | grep -E '^tern_(images_total|labelled_predictions_total|quantization_top1_ratio|model_bytes|request_duration_seconds_count|stage_duration_seconds_count)' | grep -v " 0$" | sort

if [ "$keep" = --keep ]; then
  trap - EXIT
  disown "$server"
  step "The server keeps running (process $server, repository $work/models). Try:"
  cat <<TXT
  export TERN_SERVER=$TERN_SERVER TERN_ADMIN=$TERN_ADMIN
  $ternctl models
  $ternctl classify --model demo --version 5 $photos
  $ternctl report --model demo --version 4
  $ternctl bench --model demo --version 2 --data $photos --concurrency 8 --seconds 5
  curl -s $metrics
  kill $server; rm -rf $work     # when done
TXT
else
  step "Done. Stopping the server and removing $work"
fi
