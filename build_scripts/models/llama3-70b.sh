#!/usr/bin/env bash
# LLaMA-3-70B, 80 layers: merged in pairs from layer 40 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model llama3-70b 40 8192 "$@"
