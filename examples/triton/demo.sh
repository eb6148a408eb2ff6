#!/usr/bin/env bash
# A model repository of the bundled checkpoint, on a tritonserver without Docker, asked once. Ctrl-C ends the server.
#
#   examples/triton/demo.sh [FOLDER] [--serve]        default: build/triton; --serve leaves the server running
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(cd "$here/../.." && pwd)"
folder="$root/build/triton"
if [[ $# -gt 0 && "$1" != --* ]]; then folder="$1"; shift; fi
export PATH="$root/.venv/bin:$PATH"

"$root/build_scripts/get_tritonserver.sh" --python "$(command -v python)"
minicache-trt build --model "$root/examples/demo_model/checkpoint" --output "$folder/engine" --force
minicache-trt deploy triton --engine "$folder/engine" --output "$folder/repository" --force \
  --max-queue-size 64 --python-path "$root/build/tritonserver/python"

"$root/build/tritonserver/tritonserver" --model-repository="$folder/repository" --log-verbose=0 \
  --http-address=127.0.0.1 --grpc-address=127.0.0.1 --metrics-address=127.0.0.1 > "$folder/server.log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null; wait $server' EXIT
until python -c 'import urllib.request as u; u.urlopen("http://127.0.0.1:8000/v2/health/ready")' 2> /dev/null; do
  kill -0 $server 2> /dev/null || { tail -n 20 "$folder/server.log" >&2; exit 1; }
  sleep 0.5
done
python "$here/client.py" "def main(argv):"
if [[ "${1:-}" == --serve ]]; then
  echo "the server listens on 127.0.0.1: HTTP 8000, gRPC 8001, metrics 8002; its log is $folder/server.log"
  wait $server
fi
