"""Origin of a folder: downloaded, or the user's own.

A downloaded folder counts as untrusted, whatever its path on the command line, until the user adopts it. It is
recognised by the mark that `dsc pull` writes into it, by the files of other download tools, or by its location in the
Hub's cache. The adoption is recorded in the cache of this machine, where no download can write.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from dsc_hub.errors import ConfigError
from dsc_hub.system.cache import recall_value, store_value
from dsc_hub.system.files import parse_json
from dsc_hub.system.progress import clean

MARK = ".dsc-pulled.json"  # `dsc pull` downloads no hidden files, so no repo can contain a mark
ADOPTED = "adopted.json"  # file in the cache: folder -> the id in its mark
LEFT_BY_CLIENT = Path(".cache/huggingface/download")  # created by huggingface_hub in a download folder
_CACHED = re.compile(r"(?:datasets|models|spaces)--.")
MANIFEST = "manifest.json"  # file in every repo that dsc published


def mark(folder: Path, origin: str) -> None:
    """Mark a folder as downloaded from `origin` (USER/REPO@COMMIT, or a description)."""
    text = json.dumps({"origin": origin, "id": secrets.token_hex(16)})
    part = folder / f"{MARK}.{secrets.token_hex(4)}"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / MARK)  # never through a downloaded link


def of_another(path: Path) -> str | None:
    """Return a description of the source of a downloaded file or folder; None if it is the user's own or adopted."""
    if _in_cache(path):
        return "a Hub (it lies in the cache of its client)"
    folder = _downloaded(path)
    return None if folder is None or _is_adopted(folder) else _origin(folder)


def to_adopt(folder: Path) -> tuple[Path, str]:
    """Return the downloaded folder that `folder` is, and its origin.

    ConfigError if it is the user's own already, a part of a downloaded folder, or in the cache.
    """
    if _in_cache(folder):
        raise ConfigError(
            f"{folder} lies in the cache of a Hub", "Fetch a copy with `dsc pull USER/REPO`, and adopt that."
        )
    downloaded_folder = _downloaded(folder)
    if downloaded_folder is None or _is_adopted(downloaded_folder):
        raise ConfigError(f"{folder} is your own already: nothing in it says that it was downloaded")
    if downloaded_folder != folder.resolve():
        raise ConfigError(f"{folder} is a part of the downloaded folder {downloaded_folder}", "Adopt that one whole.")
    return downloaded_folder, _origin(downloaded_folder)


def adopt(folder: Path) -> None:
    """Make a downloaded folder the user's own. ConfigError as in `to_adopt`."""
    downloaded_folder, origin = to_adopt(folder)
    mark(downloaded_folder, origin)  # a new mark: the id of a downloaded one could occur again
    store_value(ADOPTED, str(downloaded_folder), _mark(downloaded_folder)["id"])


def _in_cache(path: Path) -> bool:
    """Return whether the path is in a cache of huggingface_hub, wherever that is."""
    for place in (Path(os.path.abspath(path)), path.resolve()):
        for repo, subfolder in itertools.pairwise(place.parts):
            if _CACHED.match(repo) and subfolder in ("snapshots", "blobs", "refs"):
                return True
    return False


def _downloaded(path: Path) -> Path | None:
    """Return the nearest downloaded folder at or above `path`, checked with and without resolving links; else None."""
    for start in (path.resolve(), Path(os.path.abspath(path))):
        for folder in (start, *start.parents):
            if os.path.lexists(folder / MARK) or _came_by_client(folder, start) or _is_published(folder):
                return folder
    return None


def _came_by_client(folder: Path, path: Path) -> bool:
    """Return whether huggingface_hub downloaded this file into the folder; for a folder `path`, any file in it."""
    record = folder / LEFT_BY_CLIENT / path.relative_to(folder)
    if path.is_dir():
        return record.is_dir() and any(record.rglob("*.metadata"))
    return record.with_name(f"{record.name}.metadata").is_file()


def _is_published(folder: Path) -> bool:
    files = _read_mark(folder / MANIFEST).get("files")
    return isinstance(files, dict) and "recipe.yaml" in files


def _is_adopted(folder: Path) -> bool:
    adopted_id = recall_value(ADOPTED, str(folder))
    return adopted_id is not None and adopted_id == _mark(folder).get("id")


def _origin(folder: Path) -> str:
    origin = str(_mark(folder).get("origin") or "somebody else's repo")  # the mark may itself be downloaded
    return " ".join(clean(origin).split())[:100]


def _mark(folder: Path) -> dict[str, Any]:
    return _read_mark(folder / MARK)


def _read_mark(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or invalid."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
