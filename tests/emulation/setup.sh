#!/usr/bin/env bash
# setup.sh FOLDER: puts the kernel that run.sh boots into FOLDER/vmlinuz (once). Debian's cloud kernel, because its
# drivers for discs and serial ports are built in; it is unpacked, never installed. The other packages that run.sh
# needs are in scripts/install-deps.sh.
set -euo pipefail
folder=$1
[ -e "$folder/vmlinuz" ] && exit 0
mkdir -p "$folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
fetch() {
  kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')
  # Not as apt's own user, who may not write here.
  [ -n "$kernel" ] && apt-get download -qq -o APT::Sandbox::User=root "$kernel"
}
fetch || { echo "updating apt's lists"; apt-get update -qq && fetch; }
dpkg-deb --fsys-tarfile "$kernel"_*.deb | tar -xO "./boot/vmlinuz-${kernel#linux-image-}" > vmlinuz
cd - >/dev/null
mv "$scratch/vmlinuz" "$folder/vmlinuz"
