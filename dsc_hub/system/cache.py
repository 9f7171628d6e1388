"""Values kept across runs in the user's cache folder: hashes, measured speeds, checked settings."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from dsc_hub.errors import FULL, RunError, disk_error
from dsc_hub.system.files import parse_json


def cache_home() -> Path:
    """Return the folder of models, speeds and the embedded Hub: DSC_HUB_HOME, or dsc_hub in the user's cache folder."""
    if home := os.environ.get("DSC_HUB_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc_hub"


def writable_home() -> Path:
    """Return the folder of `cache_home`, made if it isn't there. RunError if nothing can be written there."""
    home = cache_home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(home))
    except OSError as e:
        raise _not_writable(e) from None
    return home


def _not_writable(error: OSError) -> RunError:
    if error.errno in FULL and (full := disk_error(error)):
        return full
    return RunError(
        f"dsc's cache folder {cache_home()} can't be written: {error.strerror}",
        "Set DSC_HUB_HOME to a folder that can be written.",
    )


def recall_value(name: str, key: str) -> Any:
    """Return the value that `remember_value` or `store_value` stored, or None."""
    return _recall(name).get(key)


def _recall(name: str) -> dict[str, Any]:
    try:
        value = parse_json((cache_home() / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a damaged cache counts as empty
        return {}
    return value if isinstance(value, dict) else {}


def remember_value(name: str, key: str, value: Any) -> None:
    """Store a JSON value under a key in a file of the cache, if that can be done: without it, it is made again."""
    with contextlib.suppress(RunError):
        store_value(name, key, value)


def store_value(name: str, key: str, value: Any) -> None:
    """Store a JSON value under a key in a file of the cache. RunError if that can't be done."""
    path = writable_home() / name
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(_recall(name) | {key: value}), encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise _not_writable(e) from None
