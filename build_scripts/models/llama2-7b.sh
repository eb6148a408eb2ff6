#!/usr/bin/env bash
# LLaMA-2-7B, 32 layers: merged in pairs from layer 16 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model llama2-7b 16 4096 "$@"
