#!/usr/bin/env bash
# skipped.sh BUILD: which tests of the last run were skipped, and why (ctest counts them as passed).
log=$1/Testing/Temporary/LastTest.log
reasons=$(grep -h -A1 ': Skipped$' "$log" | grep -vE '^--$|: Skipped$'; sed -n "s/.* skipped '\(.*\)'$/\1/p; s/.* skipped \"\(.*\)\"$/\1/p" "$log")
[ -n "$reasons" ] || { echo "no test was skipped"; exit 0; }
echo "skipped, by reason:"
sort <<<"$reasons" | uniq -c
