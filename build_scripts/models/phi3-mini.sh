#!/usr/bin/env bash
# Phi-3-Mini (4k), 32 layers: merged in pairs from layer 16 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model phi3-mini-4k-instruct 16 4096 "$@"
