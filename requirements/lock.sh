#!/usr/bin/env bash
# Resolve setup.cfg anew into requirements/cpu.txt and gpu.txt (needs uv):  requirements/lock.sh
# *.overrides.txt say what is left out and why. The CPU lock is what the tests run; the GPU lock is resolved, not run in CI.
set -euo pipefail
cd "$(dirname "$0")/.."
for kind in cpu gpu; do
  extra=()
  if [ $kind = cpu ]; then
    extra=(--find-links "${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}")
  fi
  uv pip compile setup.cfg --extra $kind --extra offline --extra test --extra dev --override requirements/$kind.overrides.txt \
    --index-strategy unsafe-best-match --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header --no-annotate \
    "${extra[@]}" -o requirements/$kind.txt > /dev/null
done
