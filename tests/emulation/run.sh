#!/usr/bin/env bash
# run.sh FOLDER SECONDS PROGRAM [ARGUMENTS...]: runs a static program under Linux on an emulated CPU with AVX-512 VNNI
# (Bochs, Ice Lake). FOLDER is what setup.sh made. Environment variables named TERN_* and GTEST_* go along. Prints what the program
# printed and ends with its exit status; 124 if there was none within SECONDS.
#
# Guest time is not real time, and there is one CPU: nothing can be measured here. Bochs runs about 45 million
# instructions per second and boots in 20 seconds. It opens no port: its screen is a terminal.
set -euo pipefail
folder=$1 seconds=$2 program=$3
shift 3
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Root file system: busybox, the program, and an init that runs it and switches off.
root=$scratch/root
mkdir -p "$root"/{bin,proc,dev,tmp} "$scratch/disc"
cp /bin/busybox "$root/bin/busybox"
ln -s busybox "$root/bin/sh"
cp "$program" "$root/program"
strip "$root/program" 2>/dev/null || true
{
  echo '#!/bin/sh'
  echo '/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t devtmpfs dev /dev'
  while read -r name; do
    printf 'export %s=%q\n' "$name" "${!name}"
  done < <(compgen -e | grep -E '^(TERN|GTEST)_')
  echo 'echo; echo "@@begin"'
  printf '/program'
  [ $# -eq 0 ] || printf ' %q' "$@"
  echo ' 2>&1'
  echo 'status=$?; echo; echo "@@end $status"'
  echo '/bin/busybox stty 115200 < /dev/console'  # sets what is set, once the serial port has sent everything
  echo '/bin/busybox poweroff -f'
} > "$root/init"
chmod +x "$root/init"
(cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) > "$scratch/disc/initrd"

# Kernel arguments: Bochs 2.7 reports sizes of register states that Linux calls inconsistent, and then leaves AVX off
# (pku, xsaves, xsavec); it reports fast short moves while their switch is off, and memmove overruns (fsrm). The rest
# is for speed.
cp "$folder/vmlinuz" /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$scratch/disc"
cat > "$scratch/disc/isolinux.cfg" <<'END'
DEFAULT linux
PROMPT 0
LABEL linux
  KERNEL vmlinuz
  INITRD initrd
  APPEND console=ttyS0,115200 quiet clearcpuid=pku,xsaves,xsavec,fsrm nokaslr nopti mitigations=off cryptomgr.notests initcall_blacklist=load_system_certificate_list,cubictcp_register
END
xorriso -as mkisofs -quiet -o "$scratch/disc.iso" -b isolinux.bin -c boot.cat -no-emul-boot -boot-load-size 4 \
  -boot-info-table "$scratch/disc" 2>/dev/null

# Without dummy sound drivers Bochs asks ALSA for a card and aborts.
cat > "$scratch/bochsrc" <<END
config_interface: textconfig
display_library: term
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/vgabios/vgabios.bin
cpu: model=corei7_icelake_u, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=256, host=256
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$scratch/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$scratch/serial
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
clock: sync=none, time0=1700000000
log: $scratch/log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
END
echo c > "$scratch/debugger"  # Debian's Bochs waits in its debugger for "continue"
# Bochs's own exit status says nothing: 1 after a clean end, too.
TERM=vt100 timeout --kill-after=5 "$seconds" script --quiet --return \
  --command "bochs -q -f '$scratch/bochsrc' -rc '$scratch/debugger'" "$scratch/screen" < /dev/null > /dev/null 2>&1 || true

touch "$scratch/serial"
tr -d '\r' < "$scratch/serial" > "$scratch/console"
sed -e '1,/^@@begin$/d' -e '/^@@end /,$d' "$scratch/console"
status=$(sed -n 's/^@@end \([0-9]*\)$/\1/p' "$scratch/console")
if [ -z "$status" ]; then
  echo "run.sh: no result within $seconds seconds; the end of the console and of Bochs's log:" >&2
  tail -n 15 "$scratch/console" "$scratch/log" >&2 || true
  exit 124
fi
exit "$status"
