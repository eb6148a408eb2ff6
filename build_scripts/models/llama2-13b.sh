#!/usr/bin/env bash
# LLaMA-2-13B, 40 layers: merged in pairs from layer 20 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model llama2-13b 20 4096 "$@"
