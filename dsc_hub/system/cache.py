"""Values kept across runs in the user's cache folder: hashes, measured speeds, checked settings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_home() -> Path:
    """Return the folder of models, speeds and the embedded Hub: DSC_HUB_HOME, or dsc_hub in the user's cache folder."""
    if home := os.environ.get("DSC_HUB_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc_hub"


def recall_value(name: str, key: str) -> Any:
    """Return the value that `remember_value` stored, or None."""
    return _recall(name).get(key)


def _recall(name: str) -> dict[str, Any]:
    try:
        value = json.loads((cache_home() / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # a damaged cache counts as empty
        return {}
    return value if isinstance(value, dict) else {}


def remember_value(name: str, key: str, value: Any) -> None:
    """Store a JSON value under a key in a file of the cache."""
    path = cache_home() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(_recall(name) | {key: value}), encoding="utf-8")
    os.replace(part, path)
