#!/usr/bin/env bash
# What only a GPU can show, in at most six minutes: tests/gpu/check.sh, from a clean checkout without a
# network. Needs torch >= 2.11, timm, scikit-learn and safetensors; Lightning, transformers
# and liger-kernel are tried where installed. --device cpu --quick tries the script itself.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
export PYTHONPATH="$here:$here/../..${PYTHONPATH:+:$PYTHONPATH}"
export CUBLAS_WORKSPACE_CONFIG=:4096:8  # a resume is to be bit-equal
exec "${PYTHON:-python3}" "$here/check.py" "$@"
