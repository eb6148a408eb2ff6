#!/usr/bin/env bash
# Builds the kernel libraries. Usage: build_plugins.sh [--host] [--output DIR]
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
output="$root/build/plugins"
cuda=ON
while [[ $# -gt 0 ]]; do
  case "$1" in
    --host) cuda=OFF ;;
    --output) output="$2"; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
  shift
done
cmake -S "$root/plugins" -B "$output" -DMINICACHE_CUDA="$cuda" > "$output.log" 2>&1 || { cat "$output.log" >&2; exit 2; }
cmake --build "$output" --parallel 2
