#!/usr/bin/env bash
# Everything that waits for a GPU, in steps: build for the GPU at hand, tests, benchmarks, profiles, sanitizer.
set -euo pipefail
usage() {
  cat <<'TEXT'
Usage: gpu_session.sh [--quick] [--steps LIST] [--built DIR] [--output DIR]

Needs an NVIDIA GPU and a Python ($PYTHON, default python3) with PyTorch for CUDA and this package's dependencies; to
build also nvcc and cmake. A step that fails does not stop the others; the exit code says whether one did.

  --steps LIST   some of these, comma-separated, in this order (default: all but profile and sanitize)
                   build       the kernels, and TensorRT's plugins where its headers are found (TENSORRT_INCLUDE_DIR)
                   tests       tests/gpu
                   kernels     benchmarks/kernels.py
                   end_to_end  benchmarks/end_to_end.py
                   rtx_probe   build_scripts/rtx_probe.py
                   profile     each kernel once under Nsight Compute (ncu): reports, their texts and machine code
                   sanitize    build_scripts/sanitize.sh
  --built DIR    a folder that build_plugins.sh --cuda filled, here or elsewhere, instead of step build
  --quick        few shapes and a part of the tests: about four minutes for tests and kernels
  --output DIR   where logs and JSON files go (default: build/gpu-session)
TEXT
}
fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
known="build tests kernels end_to_end rtx_probe profile sanitize"
output="$root/build/gpu-session" quick="" built="" steps="build,tests,kernels,end_to_end,rtx_probe"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --quick) quick=--quick ;;
    --steps | --built | --output)
      [[ $# -ge 2 ]] || fail "$1: expected a value" "see --help"
      case "$1" in
        --steps) steps="$2" ;;
        --built) built="$2" ;;
        --output) output="$2" ;;
      esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift
done
for name in ${steps//,/ }; do
  [[ " $known " == *" $name "* ]] || fail "--steps: unknown step $name" "steps: $known"
done
wanted() { [[ ",$steps," == *",$1,"* ]]; }
if wanted profile; then
  command -v ncu > /dev/null || fail "step profile: ncu is missing" "install Nsight Compute and put it on PATH"
fi
if [[ -n "$built" ]]; then
  [[ -f "$built/libminicache_cuda.so" ]] || fail "--built: no libminicache_cuda.so in $built" "run build_plugins.sh --cuda"
  built="$(cd "$built" && pwd)"
elif ! wanted build && [[ ! -f "$root/build/plugins-gpu/libminicache_cuda.so" ]]; then
  fail "there are no kernels in $root/build/plugins-gpu" "add build to --steps, or name a build with --built"
fi
python="${PYTHON:-python3}"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
  fail "$python finds no GPU through PyTorch" "set PYTHON to one with PyTorch for CUDA, on a machine with an NVIDIA GPU"
mkdir -p "$output"
output="$(cd "$output" && pwd)"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

seconds() { [[ -n "$quick" ]] && echo "$1" || echo "$2"; }  # quick, otherwise
step() {  # name, seconds, command ...
  local name="$1" limit="$2" start=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$output/$name.log" 2>&1 || status=$?
  echo "$name: exit code $status, $((SECONDS - start)) s; $(tail -n 1 "$output/$name.log")"
  [[ $status -eq 0 ]] || { failed=1; tail -n 15 "$output/$name.log"; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader > "$output/gpu.txt" 2>&1 || true
if [[ -z "$built" ]]; then
  built="$root/build/plugins-gpu"
  if wanted build; then
    tensorrt=()
    [[ -f "${TENSORRT_INCLUDE_DIR:-$root/build/tensorrt/include}/NvInfer.h" ]] && tensorrt=(--tensorrt)
    step build 200 build_scripts/build_plugins.sh --cuda --arch native "${tensorrt[@]}" --output "$built"
  fi
fi
# Tests and backend use the same build.
export MINICACHE_LIBRARY="$built/libminicache_cuda.so" MINICACHE_TEST_GPU_BUILD="$built"

if wanted tests; then
  select=()
  [[ -n "$quick" ]] && select=(-k "not bfloat16 and not test_replayed")
  "$python" -c 'import xdist' 2> /dev/null && select+=(-n "$(($(nproc) < 14 ? $(nproc) : 14))")
  step tests "$(seconds 150 1800)" "$python" -m pytest -p no:cacheprovider tests/gpu --tb=short --durations=10 "${select[@]}"
fi
wanted kernels &&
  step kernels "$(seconds 110 1800)" "$python" benchmarks/kernels.py $quick --json "$output/kernels.json"
wanted end_to_end &&
  step end_to_end "$(seconds 150 3600)" "$python" benchmarks/end_to_end.py $quick --json "$output/end_to_end.json"
wanted rtx_probe &&
  step rtx_probe "$(seconds 90 900)" "$python" build_scripts/rtx_probe.py --json "$output/rtx_probe.json"
if wanted profile; then
  for ops in decode restore,compress prefill; do
    report="$output/profile-${ops/,/-}"
    step "profile-${ops/,/-}" "$(seconds 80 900)" ncu --set full --clock-control none -k regex:minicache \
      --kernel-name-base mangled --nvtx -f -o "$report" \
      "$python" benchmarks/kernels.py --once $quick --ops "$ops" --models "Llama-3-8B 32/8/128"
    for page in details source; do
      ncu -i "$report.ncu-rep" --page "$page" --csv > "$report.$page.csv" 2>&1 &
    done
  done
  wait
fi
wanted sanitize && step sanitize "$(seconds 200 3600)" build_scripts/sanitize.sh
exit "$failed"
