#!/usr/bin/env bash
# Compiler launcher: runs nvcc, keeps what ptxas reports in OBJECT.ptxas and passes everything else on.
set -uo pipefail
object=""
previous=""
for argument in "$@"; do
  [[ "$previous" == "-o" ]] && object="$argument"
  previous="$argument"
done
output="$("$@" 2>&1)"
status=$?
if [[ -n "$object" ]]; then
  grep -E '^(ptxas info|ptxas warning| +[0-9]+ bytes stack)' <<< "$output" > "$object.ptxas"
  output="$(grep -vE '^(ptxas info| +[0-9]+ bytes stack)' <<< "$output")"
fi
[[ -n "$output" ]] && printf '%s\n' "$output"
exit "$status"
