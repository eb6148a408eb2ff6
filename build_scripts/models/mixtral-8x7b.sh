#!/usr/bin/env bash
# Mixtral-8x7B, 32 layers: merged in pairs from layer 16 on, as in the MiniCache paper. Options: --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
build_model mixtral-8x7b 16 8192 "$@"
