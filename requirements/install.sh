#!/usr/bin/env bash
# Put everything of a lock file into a virtual environment:  requirements/install.sh LOCK VENV
# Quick when nothing changed. Nothing is resolved: each file is a wheel whose SHA-256 is in the lock, and no package's own
# set-up code runs. The packages of tools.txt (pip, uv) come first; uv installs the rest in a fraction of pip's time.
set -euo pipefail
cd "$(dirname "$0")/.."
lock=$1 venv=$2 python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
  echo "dsc_hub needs Python 3.11 to 3.13, $python is $("$python" --version 2>&1); name another: make PYTHON=python3.12 ..." >&2
  exit 2
}
stamp=$venv/installed
want=$(cat "$lock" setup.cfg requirements/install.sh requirements/tools.txt | sha256sum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && exit 0
started=$SECONDS
echo "installing $lock into $venv (a few GB; minutes the first time) ..."
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
checked=(--no-deps --only-binary :all: --require-hashes)
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet "${checked[@]}" -r requirements/tools.txt
# uv reads neither pip's configuration nor its variables.
of_pip() { "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }
mirror=${PIP_INDEX_URL:-$(of_pip index-url)} files=${PIP_FIND_LINKS:-$(of_pip find-links)}
if [ -n "$mirror" ]; then export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-$mirror}; fi
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE=${SSL_CERT_FILE:-$PIP_CERT}; fi
uv=("$venv/bin/uv" pip install --quiet --python "$venv/bin/python")
# The CPU build of torch is not on PyPI: it is taken from where pip is told to look for files, or from PyTorch's own index.
torch=$(grep -o '^torch==[^ ]*+cpu' "$lock" || true)
from=()
if [ -n "$torch" ]; then
  from=(--index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)
  if [ -n "$files" ]; then from=(--find-links "$files"); fi
fi
version=$("$venv/bin/python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
if [ -n "$torch" ] && [ "$version" != 3.11 ]; then
  echo "the lock has the SHA-256 of $torch for Python 3.11 only: for $version it is installed unchecked" >&2
  "${uv[@]}" --no-deps --only-binary :all: "${from[@]}" "$torch"
  sed '/^torch==/,/[^\\]$/d' "$lock" > "$venv/lock.txt"
  lock=$venv/lock.txt
fi
"${uv[@]}" "${checked[@]}" "${from[@]}" -r "$lock"
"${uv[@]}" --no-deps --no-build-isolation -e .
# What a run imports is compiled now, on all cores: where Python may not write beside the sources, each start of vLLM would
# compile it anew, which takes a minute. The rest, two thirds of what is installed, is compiled when it is first imported.
imported=(torch vllm scipy sympy pandas transformers matplotlib networkx numpy peft datasets huggingface_hub mpmath pydantic
  accelerate trl openai opentelemetry fastapi urllib3 aiohttp rich jinja2 evaluate)
compiler=$(cd "$venv/bin" && pwd)/python
(cd "$("$compiler" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
  "$compiler" -W ignore -m compileall -q -j 0 -x '/(tests?|testing|models)/' "${imported[@]}") ||
  echo "not all of it could be compiled; Python does that when it imports it" >&2
echo "$want" > "$stamp"
echo "installed in $((SECONDS - started)) s"
