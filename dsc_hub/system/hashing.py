"""Hashes of files, folders and values: what fingerprints and manifests are made of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dsc_hub.system.cache import recall_value, remember_value

LARGE = 16 * 2**20  # bytes from which a file's hash is remembered


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Of a large one it is remembered as long as size and time of change are the same."""
    about = path.stat()
    key = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
    if about.st_size > LARGE and (known := recall_value("hashes.json", key)):
        return str(known)
    with path.open("rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    if about.st_size > LARGE:
        remember_value("hashes.json", key, value)
    return value


def folder_hash(folder: Path) -> str:
    """Identity of a local folder: names and content of all its files (large ones hashed once, see `machine.file_hash`)."""
    h = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        h.update(f"{path.name}\0{file_hash(path)}\0".encode())
    return h.hexdigest()[:40]


def digest(*parts: Any) -> str:
    """First 12 hex digits of the SHA-256 of the parts' canonical JSON."""
    return hashlib.sha256(_CANONICAL.encode(parts).encode()).hexdigest()[:12]


_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
