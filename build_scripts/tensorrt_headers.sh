#!/usr/bin/env bash
# Fetches TensorRT's public headers (Apache-2.0) from NVIDIA's repository, for build_plugins.sh --tensorrt.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
repository="${TENSORRT_REPOSITORY:-https://github.com/NVIDIA/TensorRT}"
release="v11.1"
output="$root/build/tensorrt"
usage() {
  cat <<TEXT
Usage: tensorrt_headers.sh [--release TAG] [--output DIR]

  --release TAG  tag of the repository (default: $release)
  --output DIR   headers appear in DIR/include (default: build/tensorrt)

\$TENSORRT_REPOSITORY names another copy of $repository.
TEXT
}

fail() {  # cause, remedy
  echo "error: $1" >&2
  echo "hint: $2" >&2
  exit 2
}

while [[ $# -gt 0 ]]; do
  case "$1" in
    --release | --output)
      [[ $# -ge 2 ]] || fail "$1: expected a value" "see --help"
      case "$1" in --release) release="$2" ;; --output) output="$2" ;; esac
      shift
      ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1" "see --help" ;;
  esac
  shift
done

command -v git > /dev/null || fail "git is missing" "apt-get install git"
mkdir -p "$output"
clone="$(mktemp -d "$output/clone.XXXXXX")"
trap 'rm -rf "$clone"' EXIT
git -c advice.detachedHead=false clone --quiet --depth 1 --filter=blob:none --sparse --branch "$release" "$repository" "$clone" ||
  fail "$repository has no release $release, or cannot be reached" "see its tags; behind a proxy set TENSORRT_REPOSITORY"
git -C "$clone" sparse-checkout set include > /dev/null
[[ -f "$clone/include/NvInferRuntime.h" ]] || fail "$repository $release has no include/NvInferRuntime.h" "name another --release"
rm -rf "$output/include"
mv "$clone/include" "$output/include"
echo "$output/include"
