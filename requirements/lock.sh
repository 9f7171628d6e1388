#!/usr/bin/env bash
# Resolve setup.cfg anew into requirements/cpu.txt and gpu.txt, with the SHA-256 of every file:  requirements/lock.sh [--upgrade]
# *.overrides.txt say what is left out and why. The CPU lock is what the tests run; the GPU lock is resolved, not run in CI.
# Only wheels (glibc 2.31 or later): a source distribution would run its own code when it is installed. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
torch=${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch/}
compile=(uv pip compile --quiet --index-strategy unsafe-best-match --python-version 3.11 --no-header --no-annotate)
for kind in cpu gpu; do
  links=()
  [ $kind = cpu ] && links=(--find-links "$torch")
  plain=$(mktemp --suffix=.txt)
  cp requirements/$kind.txt "$plain"  # versions stay as they are, but for what setup.cfg forbids or --upgrade asks for
  "${compile[@]}" setup.cfg --extra $kind --extra offline --extra tracking --extra docs --extra test --extra dev --python-platform x86_64-manylinux_2_31 \
    --override requirements/$kind.overrides.txt "${links[@]}" "$@" -o "$plain" > /dev/null
  "${compile[@]}" "$plain" --no-deps --generate-hashes --only-binary :all: --python-platform x86_64-manylinux_2_31 \
    "${links[@]}" -o requirements/$kind.txt > /dev/null
  rm "$plain"
done
# A folder of files has no hashes to read: that of torch is made here.
if [ -d "$torch" ] && version=$(grep -x 'torch==[^ ]*' requirements/cpu.txt); then
  hashes=$(sha256sum "$torch/torch-${version#torch==}-"*.whl | sed 's/ .*//; s/^/    --hash=sha256:/' | sed '$!s/$/ \\/')
  sed -i "s|^$version$|& \\\\|" requirements/cpu.txt
  sed -i "/^torch==/r "<(echo "$hashes") requirements/cpu.txt
fi
"${compile[@]}" requirements/tools.in --generate-hashes --only-binary :all: -o requirements/tools.txt > /dev/null
