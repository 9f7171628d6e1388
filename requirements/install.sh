#!/usr/bin/env bash
# Put everything of a lock file into a virtual environment:  requirements/install.sh LOCK VENV
# Quick when nothing changed. The lock is complete, so nothing is resolved and no dependency is added by pip itself.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=$1 venv=$2 python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
  echo "dsc_hub needs Python 3.11 to 3.13, $python is $("$python" --version 2>&1); name another: make PYTHON=python3.12 ..." >&2
  exit 2
}
stamp=$venv/installed
want=$(cat "$lock" setup.cfg requirements/install.sh | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0
started=$SECONDS
echo "installing $lock into $venv (a few GB; minutes the first time) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps)
torch=$(grep '^torch==' "$lock")
# The CPU build of torch is not on PyPI: first where pip is configured to look, then at PyTorch's own index.
if [[ $torch == *+cpu ]]; then
  "${pip[@]}" "$torch" 2>/dev/null || "${pip[@]}" "$torch" --index-url https://download.pytorch.org/whl/cpu
fi
"${pip[@]}" -r "$lock"
"${pip[@]}" --no-build-isolation -e .
echo "$want" > "$stamp"
echo "installed in $((SECONDS - started)) s"
