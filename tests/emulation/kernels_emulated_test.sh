#!/usr/bin/env bash
# kernels_emulated_test.sh PROGRAM: the AVX-512 variants in the kernel suites (PROGRAM holds them all, statically linked) on an
# emulated CPU. TERN_EMULATION is the folder that setup.sh made; without it, or without the tools, the test is skipped (77).
# Scalar and AVX2 variants are left out: the tests of the machine itself run those. Of the series of convolutions every fifth is tried,
# or every TERN_TEST_EVERY-th (1: all).
set -euo pipefail
program=$1
skip() {
  echo "kernels_emulated_test ... skipped 'the emulated CPU with AVX-512: $1'"
  exit 77
}
[ -e "${TERN_EMULATION:-}/vmlinuz" ] || skip "TERN_EMULATION names no folder made by tests/emulation/setup.sh"
for tool in bochs xorriso busybox script; do
  command -v "$tool" >/dev/null || skip "$tool is not installed (scripts/install-deps.sh full)"
done
for file in /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 /usr/share/vgabios/vgabios.bin \
  /usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so; do
  [ -e "$file" ] || skip "there is no $file (scripts/install-deps.sh full)"
done

output=$(mktemp)
trap 'rm -f "$output"' EXIT
export TERN_EXPECT_ISA=avx512vnni  # a variant that does not run here fails
# Every convolution would take a quarter of an hour here. 5 has no factor in common with the lengths of the inner loops (2, 3, 18),
# so that every stride, dilation, kernel and padding still comes up.
export TERN_TEST_EVERY=${TERN_TEST_EVERY:-5}
status=0
"$(dirname "$0")/run.sh" "$TERN_EMULATION" 1500 "$program" --gtest_color=no \
  '--gtest_filter=*/avx512vnni:DispatchTest.*' > "$output" || status=$?
cat "$output"
[ "$status" -eq 0 ] || exit "$status"
# gtest calls it a success if the filter matches nothing.
for suite in ClusterConvTest DepthwiseConvTest ElementwiseTest; do
  grep -q "\[       OK \] Isas/$suite\..*/avx512vnni " "$output" || { echo "no test of $suite ran" >&2; exit 1; }
done
