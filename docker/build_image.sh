#!/usr/bin/env bash
# build_image.sh [TAG]: builds docker/Dockerfile with buildah, for machines without a container
# engine or a registry (needs root). If the base image is absent it is made with debootstrap.
# Then the image is started and asked for its health, and one photograph is classified.
#   JOBS=2             compilers at once
#   DEBIAN_MIRROR=URL  for debootstrap; default: the first one of this machine's apt
#   SKIP_SMOKE=1       only build
set -euo pipefail
tag=${1:-tern}
source=$(realpath "$(dirname "$0")/..")
base=localhost/debian:bookworm-slim # what `FROM debian:bookworm-slim` finds first
for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || { echo "needs $tool (apt-get install buildah debootstrap)" >&2; exit 1; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/tern-image.XXXXXX")
container=
cleanup() {
  [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap cleanup EXIT

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -1)}
  echo "making $base with debootstrap"
  debootstrap --variant=minbase bookworm "$work/root" "$mirror" >"$work/debootstrap.log" \
    || { tail -20 "$work/debootstrap.log" >&2; exit 1; }
  rm -rf "$work"/root/var/cache/apt/* "$work"/root/var/lib/apt/lists/*
  # What this machine's apt trusts and asks, so that the build can install packages.
  for file in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/apt.conf.d; do
    [ ! -e "$file" ] || cp -rT "$file" "$work/root$file"
  done
  container=$(buildah from scratch)
  buildah add -q "$container" "$work/root" / >/dev/null
  buildah config --cmd bash "$container"
  buildah commit -q --format docker "$container" "$base" >/dev/null
  buildah rm "$container" >/dev/null
  container=
  rm -rf "$work/root"
fi

buildah bud --isolation chroot --format docker --ignorefile "$source/docker/Dockerfile.dockerignore" \
  --build-arg "JOBS=${JOBS:-2}" -f "$source/docker/Dockerfile" -t "$tag" "$source"
buildah images "$tag"
[ -z "${SKIP_SMOKE:-}" ] || exit 0

echo "starting it"
container=$(buildah from "$tag")
run() { buildah run --isolation chroot --user 65532:65532 "$container" -- "$@"; }
run /usr/local/bin/ternd --repository=/models --demo --host=127.0.0.1 --admin_host=127.0.0.1 \
  --metrics_host=127.0.0.1 --port=0 --admin_port=0 --metrics_port=0 --ports_file=/models/ports.json \
  >"$work/ternd.log" 2>&1 &
for _ in $(seq 300); do
  ports=$(run cat /models/ports.json 2>/dev/null || true)
  [ -z "$ports" ] || break
  sleep 0.2
done
[ -n "$ports" ] || { cat "$work/ternd.log" >&2; exit 1; }
port=$(sed -n 's/.*"port":\([0-9]*\).*/\1/p' <<<"$ports")
status=0
run ternctl --server "127.0.0.1:$port" health --wait 30 || status=1
photo=$(find "$source/models/demo/photos" -name '*.jpg' | sort | head -1)
if [ $status = 0 ] && [ -n "$photo" ]; then
  run ternctl --server "127.0.0.1:$port" classify --model demo - <"$photo" || status=1
fi
# The server's own process: buildah and its children do not pass signals on.
for pid in $(pgrep -f -- '--ports_file=/models/ports.json'); do
  # Seen from outside, its path starts with the container's root.
  case "$(readlink "/proc/$pid/exe" 2>/dev/null)" in */usr/local/bin/ternd) kill -TERM "$pid" ;; esac
done
wait || true
tail -3 "$work/ternd.log"
exit $status
