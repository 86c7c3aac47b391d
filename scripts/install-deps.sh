#!/usr/bin/env bash
# Installs the Debian packages that a task needs: build, demo, test (build and test tools), full (also torch for the parity
# fixtures, an emulator, what runs containers, Prometheus, HAProxy and a browser), finetune (tern-finetune and its tests: libtorch), fuzz (clang with
# libFuzzer). Repeating it is cheap: packages that are there are not asked for again.
set -euo pipefail

build=(g++ cmake ninja-build make pkgconf
  libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev libonnx-dev
  libdnnl-dev ocl-icd-opencl-dev libopencv-core-dev libopencv-imgproc-dev libtbb-dev
  libturbojpeg0-dev libpng-dev libwebp-dev libexif-dev
  libboost-dev prometheus-cpp-dev libspdlog-dev nlohmann-json3-dev libcli11-dev libeigen3-dev libisal-dev libssl-dev)
demo=(curl)
test=(libgtest-dev libgmock-dev libbenchmark-dev python3 python3-yaml python3-grpcio python3-protobuf python3-h2 libfaketime curl openssl
  python3-jsonschema busybox-static)
finetune=(libtorch-dev)
# The versions that belong to Debian's clang: its sanitizers and OpenMP. llvm: the symbolizer and the coverage tools.
fuzz=(clang libclang-rt-dev libomp-dev llvm)
full=(python3-torch python3-torchvision python3-pil python3-numpy python3-venv libopenblas0-pthread
  buildah podman runc ca-certificates prometheus haproxy chromium)
if [ "$(dpkg --print-architecture)" = amd64 ]; then
  # The emulated CPU of tests/emulation, which also unpacks a kernel package.
  full+=(bochs bochs-term vgabios xorriso isolinux syslinux-common)
fi

case "${1:-build}" in
  build) packages=("${build[@]}") ;;
  demo) packages=("${build[@]}" "${demo[@]}") ;;
  test) packages=("${build[@]}" "${test[@]}") ;;
  full) packages=("${build[@]}" "${test[@]}" "${full[@]}") ;;
  finetune) packages=("${build[@]}" "${test[@]}" "${finetune[@]}") ;;
  fuzz) packages=("${build[@]}" "${test[@]}" "${fuzz[@]}") ;;
  *) echo "usage: $0 build|demo|test|full|finetune|fuzz" >&2; exit 2 ;;
esac

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
  exit 0
fi
echo "installing ${#missing[@]} Debian packages: ${missing[*]}"
sudo=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "need root or sudo to install: ${missing[*]}" >&2; exit 1; }
  sudo=(sudo)
fi
export DEBIAN_FRONTEND=noninteractive
"${sudo[@]}" apt-get update -qq
"${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
