#!/usr/bin/env bash
# build_image.sh [--programs FOLDER] [TAG]: builds the image of docker/Dockerfile with buildah, for machines without a
# container engine or a registry (needs root). TAG is `tern` unless given.
#   --programs FOLDER  takes the ternd and ternctl that this machine (Debian) has built, instead of compiling them: seconds
#                      instead of many minutes
# Otherwise everything is compiled in the base image, which is made with debootstrap if it is absent.
#   JOBS=2             compilers at once
#   DEBIAN_MIRROR=URL  for debootstrap; default: the first one of this machine's apt
# tests/deploy/image_test.py --image TAG tries the result.
set -euo pipefail
programs=
if [ "${1:-}" = --programs ]; then
  programs=${2:?--programs wants a folder with ternd and ternctl}
  shift 2
fi
tag=${1:-tern}
source=$(realpath "$(dirname "$0")/..")
base=localhost/debian:bookworm-slim # what `FROM debian:bookworm-slim` finds first
tools=(buildah)
[ -n "$programs" ] || tools+=(debootstrap)
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null || { echo "needs $tool (apt-get install ${tools[*]})" >&2; exit 1; }
done
work=$(mktemp -d "${TMPDIR:-/tmp}/tern-image.XXXXXX")
container=
cleanup() {
  [ -z "$container" ] || buildah rm "$container" >/dev/null 2>&1 || true
  rm -rf "$work"
}
trap cleanup EXIT

build=(buildah bud --isolation chroot --format docker --ignorefile "$source/docker/Dockerfile.dockerignore"
  -f "$source/docker/Dockerfile" -t "$tag")
if [ -n "$programs" ]; then
  # This folder stands for the stage `build`, which is not run then.
  "$source/docker/rootfs.sh" "$work" "$programs/ternd" "$programs/ternctl"
  build+=(--build-context "build=$work")
elif ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sed -n 1p)}
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
"${build[@]}" --build-arg "JOBS=${JOBS:-2}" "$source"
buildah images "$tag"
