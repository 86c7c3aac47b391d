#!/usr/bin/env bash
# fuzz.sh BUILD SECONDS [TARGET...]: runs each libFuzzer target (all by default) for that long, one after the other, and
# prints what it did. What it finds new lies in BUILD/corpus/TARGET and is used again by the next run; inputs that crash,
# hang or take too much memory lie in BUILD/finds. Exit status 1 if there was one.
set -uo pipefail
build=$(realpath "$1")
seconds=$2
shift 2
source=$(realpath "$(dirname "$0")/..")
fuzz=$source/tests/fuzz
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(artifact config image infer onnx plan)
export ASAN_OPTIONS=detect_leaks=1:allocator_may_return_null=1:malloc_context_size=20
export UBSAN_OPTIONS=print_stacktrace=1
export OMP_NUM_THREADS=1
mkdir -p "$build/finds"
failed=0
printf '%-10s %12s %8s %9s %8s %8s  %s\n' target executions per_s coverage features corpus result
for target in "${targets[@]}"; do
  program=$build/bin/${target}_fuzzer
  [ -x "$program" ] || { echo "there is no target $target" >&2; exit 2; }
  corpus=$build/corpus/$target
  log=$build/$target.log
  mkdir -p "$corpus"
  # Every bound is one that an input of this size must not reach: a bomb is a find.
  bounds=(-max_len=16384 -timeout=10 -rss_limit_mb=2048 -malloc_limit_mb=512)
  [ ! -e "$fuzz/dictionaries/$target.dict" ] || bounds+=(-dict="$fuzz/dictionaries/$target.dict")
  seeds=()
  for folder in "$fuzz/corpus/$target"; do [ ! -d "$folder" ] || seeds+=("$folder"); done
  case $target in
    image) seeds+=("$source/tests/image/fixtures") ;;
    plan) seeds+=("$fuzz/corpus/artifact") ;;
  esac
  "$program" "${bounds[@]}" -max_total_time="$seconds" -print_final_stats=1 -artifact_prefix="$build/finds/$target-" \
    "$corpus" "${seeds[@]}" >"$log" 2>&1
  result=$?
  [ $result -eq 0 ] || failed=1
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
  rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$log")
  last=$(grep -E '^#[0-9]+.* cov: ' "$log" | tail -1)
  cov=$(sed -n 's/.* cov: \([0-9]*\).*/\1/p' <<<"$last")
  ft=$(sed -n 's/.* ft: \([0-9]*\).*/\1/p' <<<"$last")
  inputs=$(sed -n 's/.* corp: \([0-9]*\).*/\1/p' <<<"$last")
  printf '%-10s %12s %8s %9s %8s %8s  %s\n' "$target" "${executions:-?}" "${rate:-?}" "${cov:-?}" "${ft:-?}" "${inputs:-?}" \
    "$([ $result -eq 0 ] && echo clean || grep -m1 -oE 'SUMMARY: .*|broken promise: .*' "$log" || echo "status $result")"
  [ $result -eq 0 ] || { echo "  $log; the input: $(sed -n 's/.*Test unit written to //p' "$log")"; }
done
exit $failed
