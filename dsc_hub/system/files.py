"""Whole files: atomic reads and writes (a reader sees the old file or the new one, never a part)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from dsc_hub.errors import RunError


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: a reader sees the old file or the new one, never a partial file."""
    write_lines(path, [text.encode()])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines atomically; for content larger than memory. The lines may be read from the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.writelines(lines)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; RunError as in `read_json`, or if the value is not an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(
            f"{path} is damaged: expected an object", "Move the whole run folder away and run the recipe again."
        )
    return value


def read_json(path: Path) -> Any:
    """Return the JSON value in a file; RunError with the file's name if it is missing or not JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path} is missing", "Run the stage that writes it, or the whole recipe with `dsc run`."
        ) from None
    except ValueError as e:
        raise RunError(f"{path} is damaged: {e}", "Move the whole run folder away and run the recipe again.") from None


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; ValueError if it is none, or if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def packaged_folder(name: str) -> Path:
    """Return the folder of packaged data (`recipes`, `model_cards`): in the wheel, or next to a checkout's package."""
    inside = Path(str(resources.files("dsc_hub"))) / name
    return inside if inside.is_dir() else inside.parent.parent / name


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists: its file system is where the folder would be made."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
