#!/usr/bin/env bash
# Build two engines from the bundled checkpoint, generate text with each, and compare both with PyTorch.
# Usage: examples/demo.sh [OUTPUT_DIR]; needs minicache-trt on PATH (make demo sees to that).
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
output="${1:-build}"
checkpoint="$here/demo_model/checkpoint"
prompt="The import statement"

show() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

mkdir -p "$output"
show minicache-trt build --model "$checkpoint" --method kivi4 --output "$output/demo-kivi4" --force
show minicache-trt run --engine "$output/demo-kivi4" --prompt "$prompt" --max-tokens 220 --temperature 0.7 --seed 2
show minicache-trt compare --engine "$output/demo-kivi4" --prompts "$here/prompts.txt" --max-tokens 100

# The MiniCache paper's plan: later half of the layers merged in pairs. It saves memory and costs quality; see by how much.
show minicache-trt build --model "$checkpoint" --merge-start 4 --kv-format int4 --output "$output/demo-minicache" --force
show minicache-trt run --engine "$output/demo-minicache" --prompt "$prompt" --max-tokens 220 --temperature 0.7 --seed 2
show minicache-trt compare --engine "$output/demo-minicache" --prompts "$here/prompts.txt" --max-tokens 100
