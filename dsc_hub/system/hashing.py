"""Hashes of files, folders and values, for fingerprints and manifests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dsc_hub.system.cache import recall_value, remember_value

LARGE = 16 * 2**20  # minimum size in bytes of files whose hashes are cached


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file. Hashes of large files are cached by path, size and modification time."""
    status = path.stat()
    key = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    if status.st_size > LARGE and (cached := recall_value("hashes.json", key)):
        return str(cached)
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if status.st_size > LARGE:
        remember_value("hashes.json", key, value)
    return value


def folder_hash(folder: Path) -> str:
    """Return the identity of a local folder: hash of names and contents of all its files (cached, see `file_hash`)."""
    h = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        h.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return h.hexdigest()[:40]


def digest(*parts: Any) -> str:
    """Return the first 12 hex digits of the SHA-256 of the parts' canonical JSON."""
    return hashlib.sha256(_CANONICAL.encode(parts).encode()).hexdigest()[:12]


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
