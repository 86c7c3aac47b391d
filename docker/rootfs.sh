#!/usr/bin/env bash
# rootfs.sh OUT PROGRAM...: makes OUT/rootfs, all that the image contains: the programs (stripped), the shared
# libraries that the dynamic loader wants for them and the loader itself, Mozilla's certificate authorities, the user that
# the server runs as, its folder /models, and the licence texts. No shell, no package manager, nothing else.
#
# It runs where the programs were built (Debian): in the Dockerfile's first stage, or on this machine for build_image.sh.
set -euo pipefail
out=$1/rootfs
shift
source=$(realpath "$(dirname "$0")/..")
[ ! -e "$out" ] || { echo "rootfs.sh: $out exists" >&2; exit 1; }
umask 022
mkdir -p "$out"
for program in "$@"; do
  install -D -s -m 755 "$program" "$out/usr/local/bin/$(basename "$program")"
done

listed=$(ldd "$@")
if grep 'not found' <<<"$listed" >&2; then
  exit 1
fi
# Lines of ldd: "NAME => PATH (ADDRESS)", for the loader "PATH (ADDRESS)".
mapfile -t libraries < <(sed -nE 's/^\s+(.* => )?(\/\S+) \(0x[0-9a-f]+\)$/\2/p' <<<"$listed" | sort -u)
for library in "${libraries[@]}"; do
  install -D -m "$(stat -L -c %a "$library")" "$library" "$out$library"
done

# The package's own list: this machine may trust others besides.
mkdir -p "$out/etc/ssl/certs"
cat /usr/share/ca-certificates/mozilla/*.crt >"$out/etc/ssl/certs/ca-certificates.crt"

cp /etc/debian_version "$out/etc/"
install -D -m 644 /etc/os-release "$out/etc/os-release"
cat >"$out/etc/passwd" <<'EOF'
root:x:0:0:root:/:/sbin/nologin
tern:x:65532:65532:Tern:/models:/sbin/nologin
EOF
cat >"$out/etc/group" <<'EOF'
root:x:0:
tern:x:65532:
EOF
echo 'hosts: files dns' >"$out/etc/nsswitch.conf"
# It belongs to the server's user, so that a volume made from it does too.
install -d -o 65532 -g 65532 "$out/models"

# What is in the image belongs to these packages: the libraries, and what the programs contain of archives and headers
# (one file of each package).
archives=/usr/lib/$(g++ -print-multiarch)
files=($(realpath "${libraries[@]}") "$archives"/lib{grpc,grpc++,protobuf,absl_base,opencv_core,opencv_imgproc}.a
  /usr/include/{onnx/onnx.proto,boost/beast.hpp,nlohmann/json.hpp,CLI/CLI.hpp,eigen3/Eigen/Core})
# Some packages list their files as they were before /lib became a link to /usr/lib; dpkg-query fails if it misses any.
owners=$(dpkg-query -S "${files[@]}" "${files[@]#/usr}" 2>/dev/null || true)
owned=$(sed 's/.*: //' <<<"$owners")
for file in "${files[@]}"; do
  grep -qxF -e "$file" -e "${file#/usr}" <<<"$owned" \
    || { echo "rootfs.sh: $file belongs to no Debian package: its licence is unknown" >&2; exit 1; }
done
install -D -m 644 "$source/LICENSE" "$out/usr/share/doc/tern/copyright"
mkdir -p "$out/var/lib/dpkg/status.d"
for package in $(cut -d: -f1 <<<"$owners" | sort -u) base-files ca-certificates; do
  # Where scanners look for the versions of what lies in an image without dpkg.
  dpkg-query -s "$package" >"$out/var/lib/dpkg/status.d/$package"
  case $package in
    libboost*) ;; # two megabytes, which Boost's licence does not ask for beside object code
    *) install -D -m 644 "/usr/share/doc/$package/copyright" "$out/usr/share/doc/$package/copyright" ;;
  esac
done
cp -a /usr/share/common-licenses "$out/usr/share/"
