"""Files that are read and written whole: a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from dsc_hub.errors import RunError


def write_whole(path: Path, text: str) -> None:
    """Write so that a reader sees the old file or the new one, never half of either."""
    write_lines(path, [text.encode()])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """`write_whole` for what may be larger than memory. The lines may be read from the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.writelines(lines)
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """`read_json`, and RunError if the value is no JSON object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunError(
            f"{path} is damaged: expected an object", "Move the whole run folder away and run the recipe again."
        )
    return value


def read_json(path: Path) -> Any:
    """The file's value; RunError with the file's name if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{path} is missing", "Run the stage that writes it, or the whole recipe with `dsc run`."
        ) from None
    except (ValueError, RecursionError) as e:
        raise RunError(f"{path} is damaged: {e}", "Move the whole run folder away and run the recipe again.") from None


def packaged_folder(name: str) -> Path:
    """Folder of packaged data, `recipes` or `model_cards`: in the installed wheel, or beside the package in a checkout."""
    inside = Path(str(resources.files("dsc_hub"))) / name
    return inside if inside.is_dir() else inside.parent.parent / name
