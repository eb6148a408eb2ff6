#!/usr/bin/env bash
# Runs the GPU tests under NVIDIA's compute-sanitizer. Usage: sanitize.sh [memcheck|racecheck|synccheck|initcheck ...] [-- pytest options]
# Default: memcheck, racecheck and synccheck over tests/gpu without its backend tests, which repeat the same kernels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

tools=()
while [[ $# -gt 0 && "$1" != "--" ]]; do
  case "$1" in
    memcheck | racecheck | synccheck | initcheck) tools+=("$1") ;;
    *) fail "unknown tool $1" "tools: memcheck, racecheck, synccheck, initcheck" ;;
  esac
  shift
done
[[ $# -gt 0 ]] && shift
[[ ${#tools[@]} -gt 0 ]] || tools=(memcheck racecheck synccheck)

sanitizer="$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")"
[[ -x "$sanitizer" ]] || fail "compute-sanitizer is missing" "install the CUDA toolkit and put its bin folder on PATH"
python="${PYTHON:-python3}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  fail "PyTorch finds no GPU" "run this on a machine with an NVIDIA GPU"

# Memory from PyTorch's cache hides accesses behind a tensor's end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in "${tools[@]}"; do
  echo "== $tool"
  "$sanitizer" --tool "$tool" --error-exitcode 1 --target-processes all --kernel-name-exclude "regex:at::native" \
    "$python" -m pytest tests/gpu/test_codec.py tests/gpu/test_attention.py -p no:xdist "$@"
done
