#!/usr/bin/env bash
# LLaMA-3-8B, 32 layers: merged in pairs from layer 16 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model llama3-8b 16 8192 "$@"
