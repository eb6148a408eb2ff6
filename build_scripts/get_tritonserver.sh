#!/usr/bin/env bash
# Fetches a tritonserver that runs without Docker and without a GPU, for tests and trials. Nothing is installed.
set -euo pipefail

version=0.7.0     # of nvidia-pytriton; carries Triton Inference Server 2.51
numpy=1.26.4      # the Python stubs of that server cannot read tensors of strings with NumPy 2

usage() {
  cat <<TEXT
Usage: get_tritonserver.sh [options]

Unpacks the server in the PyPI wheel nvidia-pytriton $version and, beside it, NumPy $numpy for its Python backend.
Does nothing when that is done already. Afterwards:

  build/tritonserver/tritonserver --model-repository=REPO
  minicache-trt deploy triton --python-path build/tritonserver/python ...

  --output DIR     where to (default: build/tritonserver)
  --python FILE    Python that models will run in (default: .venv/bin/python, or python3)
  --help           this text
TEXT
}

fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
output="$root/build/tritonserver"
python="$root/.venv/bin/python"
[[ -x "$python" ]] || python=python3
while [[ $# -gt 0 ]]; do
  case "$1" in
    --output | --python)
      [[ $# -ge 2 ]] || fail "$1: expected a value" "see --help"
      case "$1" in --output) output="$2" ;; --python) python="$2" ;; esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift
done
command -v "$python" > /dev/null || fail "$python: no such program" "give --python FILE"
[[ "$(uname -s) $(uname -m)" == "Linux x86_64" ]] || fail "the server is there for Linux on x86-64 only" "use Docker"

# The stub is linked to a shared libpython, which need not be where the loader looks by itself.
read -r series library_folder library < <("$python" -c '
import sys, sysconfig
get = sysconfig.get_config_var
print(f"{sys.version_info.major}.{sys.version_info.minor}", get("LIBDIR"), get("INSTSONAME"))')
[[ -e "$library_folder/$library" && "$library" == *.so* ]] || fail \
  "$python has no shared library (libpython$series.so)" "use a Python that was built with --enable-shared"

mkdir -p "$output"
output="$(cd "$output" && pwd)"
if command -v flock > /dev/null; then
  exec 9> "$output/.fetching"
  flock 9
fi
done_for="$version $numpy $series $library_folder"
if [[ -x "$output/tritonserver" && "$(cat "$output/.complete" 2>/dev/null)" == "$done_for" ]]; then
  echo "$output/tritonserver is there already"
  exit 0
fi

rm -rf "$output/server" "$output/python" "$output/download" "$output/.complete"
pip=("$python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --no-deps --no-compile --only-binary :all: --target "$output/python" "numpy==$numpy" || fail \
  "NumPy $numpy cannot be installed for Python $series" "use Python 3.9 to 3.12"
"${pip[@]}" download --no-deps --dest "$output/download" "nvidia-pytriton==$version" || fail \
  "nvidia-pytriton $version cannot be downloaded" "check the access to PyPI, and that the wheel fits this system"
mkdir "$output/server"
"$python" -m zipfile -e "$output"/download/*.whl "$output/server"
rm -rf "$output/download"

server="$output/server/pytriton/tritonserver"
stub="$server/python_backend_stubs/$series/triton_python_backend_stub"
[[ -f "$stub" ]] || fail "the server has no stub for Python $series" "use one of: $(ls "$server/python_backend_stubs" | xargs)"
mv "$stub" "$server/backends/python/"
rm -rf "$server/python_backend_stubs" "$server/caches" "$output/python/numpy/tests"
chmod +x "$server/bin/tritonserver" "$server/backends/python/triton_python_backend_stub"
cat > "$output/tritonserver" <<TEXT
#!/bin/sh
export LD_LIBRARY_PATH="$output/server/nvidia_pytriton.libs:$library_folder\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec "$server/bin/tritonserver" --backend-directory="$server/backends" "\$@"
TEXT
chmod +x "$output/tritonserver"
problem="$("$output/tritonserver" --help 2>&1 | grep "error while loading" || true)"
[[ -z "$problem" ]] || fail "the server does not start: $problem" "it needs glibc 2.35 or later"
echo "$done_for" > "$output/.complete"
echo "$output/tritonserver is ready"
