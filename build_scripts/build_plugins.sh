#!/usr/bin/env bash
# Builds the kernel libraries of plugins/. Incremental; several may run at once, also on one folder.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: build_plugins.sh [options]

Builds libminicache_cuda.so (nvcc) and libminicache_host.so (the same sources on the CPU), and with --tensorrt the
TensorRT plugins around them, libminicache_trt_plugins.so and libminicache_trt_plugins_host.so, and the test harness.

  --host         only the host library; needs no nvcc
  --cuda         only the CUDA library
  --emulated     only libminicache_emulated.so, for tests without a GPU: the CUDA kernels and their launchers as nvcc
                 compiles them, with a CUDA runtime that runs their PTX on the CPU
  --tensorrt     also the TensorRT plugins; needs TensorRT's public headers (10.16 or 11.x), no TensorRT
  --include DIR  folder of those headers (default: $TENSORRT_INCLUDE_DIR, else build/tensorrt/include, where
                 build_scripts/tensorrt_headers.sh puts them, else /usr/include)
  --arch LIST    GPU architectures, such as 90a or 80,90a; native: this machine's GPU
                 (default: 80,86,89,90a,100,120, the last one also as PTX)
  --reduced      a quick check: one architecture (90a) and few instantiations
  --output DIR   build folder, where the libraries appear too (default: build/plugins)
  --jobs N       compilations at a time (default: all cores)
  --help         this text

After a CUDA build, a table tells registers, spills and shared memory of every kernel. Warnings are errors, and so are
spills of attention kernels.
TEXT
}

fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

present_architecture() {
  local capability
  capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')" || true
  [[ "$capability" =~ ^[0-9]+$ ]] || fail "--arch native: nvidia-smi finds no GPU" "name an architecture, such as 90a"
  [[ "$capability" == 90 ]] && capability=90a
  echo "$capability"
}

# Prints the folder of TensorRT's headers: the first argument, if there is one, or where they usually are.
header_folder() {
  local given="${1:-${TENSORRT_INCLUDE_DIR:-}}" folder found=""
  local folders=("$root/build/tensorrt/include" "/usr/include/$(uname -m)-linux-gnu" /usr/include)
  [[ -z "$given" ]] || folders=("$given")
  local get="build_scripts/tensorrt_headers.sh fetches them from NVIDIA's public repository (or install\
 libnvinfer-headers-dev from NVIDIA's); name a folder that has them with --include or TENSORRT_INCLUDE_DIR"
  for folder in "${folders[@]}"; do
    [[ -f "$folder/NvInferRuntime.h" ]] && { found="$folder"; break; }
  done
  [[ -n "$found" ]] || fail "TensorRT's headers are missing: no NvInferRuntime.h in ${folders[0]}" "$get"
  grep -q IPluginV3OneBuildV2 "$found/NvInferRuntime.h" ||
    fail "TensorRT's headers in $found are too old: they have no IPluginV3OneBuildV2" "$get"
  (cd "$found" && pwd)
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$root/build/plugins"
host=ON cuda=ON emulated=OFF only="" tensorrt=OFF include="" reduced=OFF arch="" jobs="$(nproc 2>/dev/null || echo 2)"
while [[ $# -gt 0 ]]; do
  case "$1" in
    --host | --cuda | --emulated)
      [[ -z "$only" || "$only" == "$1" ]] || fail "$only and $1 exclude each other" "leave both out to build both libraries"
      only="$1"
      ;;
    --reduced) reduced=ON ;;
    --tensorrt) tensorrt=ON ;;
    --arch | --include | --output | --jobs)
      [[ $# -ge 2 ]] || fail "$1: expected a value" "see --help"
      case "$1" in
        --arch) arch="$2" ;;
        --include) include="$2" ;;
        --output) output="$2" ;;
        --jobs) jobs="$2" ;;
      esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift
done
[[ "$jobs" =~ ^[1-9][0-9]*$ ]] || fail "--jobs: expected a positive number, got $jobs" "such as --jobs 2"
case "$only" in
  --host) cuda=OFF ;;
  --cuda) host=OFF ;;
  --emulated) host=OFF cuda=OFF emulated=ON ;;
esac
[[ "$arch" != native ]] || arch="$(present_architecture)"
if [[ -z "$arch" ]]; then
  [[ "$reduced" == ON ]] && arch=90a || arch="80,86,89,90a,100,120"
fi
[[ "$arch" =~ ^[0-9]+[a-z]?(,[0-9]+[a-z]?)*$ ]] || fail "--arch: expected numbers such as 80,90a, got $arch" "see --help"

command -v cmake > /dev/null || fail "cmake is missing" "apt-get install cmake, or pip install cmake"
compiler="${CXX:-g++}"
command -v "$compiler" > /dev/null || fail "$compiler is missing" "apt-get install g++, or set CXX"
options=()
if [[ "$host" == OFF || "$cuda" == ON ]]; then
  nvcc="${CUDACXX:-$(command -v nvcc || echo "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")}"
  [[ -x "$nvcc" ]] || fail "nvcc is missing" \
    "install the CUDA toolkit (12.8 or later) and put nvcc on PATH, or use --host to build for the CPU only"
  options+=("-DCMAKE_CUDA_COMPILER=$nvcc")
fi
generator="Unix Makefiles"
if command -v ninja > /dev/null; then
  generator="Ninja"
else
  command -v make > /dev/null || fail "neither ninja nor make is there" "apt-get install ninja-build"
fi

if [[ "$tensorrt" == ON ]]; then
  include="$(header_folder "$include")" || exit 2
  options+=("-DTENSORRT_INCLUDE_DIR=$include")
fi

mkdir -p "$output"
output="$(cd "$output" && pwd)"
if command -v flock > /dev/null; then
  exec 9> "$output/.building"
  flock 9
fi
log="$output/configure.log"
cmake -S "$root/plugins" -B "$output" -G "$generator" -DCMAKE_CXX_COMPILER="$(command -v "$compiler")" "${options[@]}" \
  -DMINICACHE_CUDA="$cuda" -DMINICACHE_HOST="$host" -DMINICACHE_EMULATED="$emulated" -DMINICACHE_TENSORRT="$tensorrt" -DMINICACHE_REDUCED="$reduced" -DMINICACHE_TARGETS="${arch//,/;}" \
  > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
cmake --build "$output" --parallel "$jobs"
if [[ "$cuda" == ON ]]; then
  python3 "$root/build_scripts/ptxas_report.py" "$output"
fi
