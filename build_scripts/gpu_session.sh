#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: build for the GPU at hand, tests, both benchmarks.
set -euo pipefail
usage() {
  cat <<'TEXT'
Usage: gpu_session.sh [--quick] [--output DIR]

Builds the kernels for this machine's GPU, runs tests/gpu, then benchmarks/kernels.py and benchmarks/end_to_end.py.
Needs an NVIDIA GPU, nvcc, cmake, and a Python ($PYTHON, default python3) with PyTorch for CUDA and this package's
dependencies. A step that fails does not stop the others; the exit code says whether one did.

  --quick        few shapes and a part of the tests; at most nine minutes
  --output DIR   where logs and JSON files go (default: build/gpu-session)
TEXT
}
fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$root/build/gpu-session" quick=""
while [[ $# -gt 0 ]]; do
  case "$1" in
    --quick) quick=--quick ;;
    --output) [[ $# -ge 2 ]] || fail "--output: expected a folder" "see --help"; output="$2"; shift ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift
done
python="${PYTHON:-python3}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
  fail "$python finds no GPU through PyTorch" "set PYTHON to one with PyTorch for CUDA, on a machine with an NVIDIA GPU"
mkdir -p "$output"
output="$(cd "$output" && pwd)"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
failed=0

step() {  # name, seconds, command ...
  local name="$1" limit="$2" start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$output/$name.log" 2>&1 || status=$?
  echo "$name: exit code $status, $((SECONDS - start)) s; $(tail -n 1 "$output/$name.log")"
  [[ $status -eq 0 ]] || { failed=1; tail -n 15 "$output/$name.log"; }
}

# Tests and backend use the same build.
step build 200 build_scripts/build_plugins.sh --cuda --arch native --output build/plugins-gpu
export MINICACHE_LIBRARY="$root/build/plugins-gpu/libminicache_cuda.so"
select=()
[[ -n "$quick" ]] && select=(-k "not bfloat16 and not test_replayed")
step tests "$([[ -n "$quick" ]] && echo 110 || echo 1800)" "$python" -m pytest tests/gpu "${select[@]}"
step kernels "$([[ -n "$quick" ]] && echo 90 || echo 1800)" "$python" benchmarks/kernels.py $quick --json "$output/kernels.json"
step end_to_end "$([[ -n "$quick" ]] && echo 130 || echo 3600)" \
  "$python" benchmarks/end_to_end.py $quick --json "$output/end_to_end.json"
step rtx_probe "$([[ -n "$quick" ]] && echo 120 || echo 900)" "$python" build_scripts/rtx_probe.py --json "$output/rtx_probe.json"
exit "$failed"
