#!/usr/bin/env bash
# What only a GPU shows, in under ten minutes:  tests/gpu/check.sh [JSON]
# PYTHON names the interpreter of an environment of requirements/gpu.txt (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1
exec "${PYTHON:-.venv/bin/python}" -m tests.gpu.check --json "${1:-gpu-check.json}"
