"""Whose a folder is: downloaded from somebody, or the user's own.

What was downloaded stays somebody else's, however it is named on the command line, until the user adopts it. It is known
by the mark that `dsc pull` leaves in the folder, by what other tools leave there, or by its place in the Hub's cache. The
adoption is recorded in the cache of this machine, where no download can write.
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
from dsc_hub.system.cache import recall_value, remember_value
from dsc_hub.system.progress import clean

MARK = ".dsc-pulled.json"  # `dsc pull` takes no hidden files, so no repo can bring one
ADOPTED = "adopted.json"  # of the cache: folder -> the id in its mark
LEFT_BY_CLIENT = Path(".cache/huggingface/download")  # in a folder that huggingface_hub downloaded to
_CACHED = re.compile(r"(?:datasets|models|spaces)--.")
MANIFEST = "manifest.json"  # of every repo that dsc published


def mark(folder: Path, origin: str) -> None:
    """Mark a folder as downloaded from `origin` (USER/REPO@COMMIT, or words)."""
    text = json.dumps({"origin": origin, "id": secrets.token_hex(16)})
    part = folder / f"{MARK}.{secrets.token_hex(4)}"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / MARK)  # never through a link that came with the files


def of_another(path: Path) -> str | None:
    """Where the file or folder at `path` was downloaded from, in words; None if it is the user's own or adopted."""
    if _in_cache(path):
        return "a Hub (it lies in the cache of its client)"
    folder = _downloaded(path)
    return None if folder is None or _is_adopted(folder) else _origin(folder)


def to_adopt(folder: Path) -> tuple[Path, str]:
    """The downloaded folder that `folder` is, and where it came from. ConfigError if it is the user's own already, a part of a
    downloaded one, or in the cache."""
    if _in_cache(folder):
        raise ConfigError(
            f"{folder} lies in the cache of a Hub", "Fetch a copy with `dsc pull USER/REPO`, and adopt that."
        )
    found = _downloaded(folder)
    if found is None or _is_adopted(found):
        raise ConfigError(f"{folder} is your own already: nothing in it says that it was downloaded")
    if found != folder.resolve():
        raise ConfigError(f"{folder} is a part of the downloaded folder {found}", "Adopt that one whole.")
    return found, _origin(found)


def adopt(folder: Path) -> None:
    """Make a downloaded folder the user's own. ConfigError as `to_adopt`."""
    found, origin = to_adopt(folder)
    mark(found, origin)  # anew: the id of a mark that came with the files could come again
    remember_value(ADOPTED, str(found), _mark(found)["id"])


def _in_cache(path: Path) -> bool:
    """Does it lie in a cache of huggingface_hub, wherever that is?"""
    for place in (Path(os.path.abspath(path)), path.resolve()):
        for repo, inside in itertools.pairwise(place.parts):
            if _CACHED.match(repo) and inside in ("snapshots", "blobs", "refs"):
                return True
    return False


def _downloaded(path: Path) -> Path | None:
    """The nearest folder at or above `path` that was downloaded, by the name given and by the one behind its links."""
    for start in (path.resolve(), Path(os.path.abspath(path))):
        for folder in (start, *start.parents):
            if os.path.lexists(folder / MARK) or _came_by_client(folder, start) or _is_published(folder):
                return folder
    return None


def _came_by_client(folder: Path, path: Path) -> bool:
    """Did huggingface_hub download this very file into the folder (or, if `path` is a folder, anything of what is in it)?"""
    kept = folder / LEFT_BY_CLIENT / path.relative_to(folder)
    if path.is_dir():
        return kept.is_dir() and any(kept.rglob("*.metadata"))
    return kept.with_name(f"{kept.name}.metadata").is_file()


def _is_published(folder: Path) -> bool:
    files = _read(folder / MANIFEST).get("files")
    return isinstance(files, dict) and "recipe.yaml" in files


def _is_adopted(folder: Path) -> bool:
    known = recall_value(ADOPTED, str(folder))
    return known is not None and known == _mark(folder).get("id")


def _origin(folder: Path) -> str:
    words = str(_mark(folder).get("origin") or "somebody else's repo")  # the mark may have come with the files
    return " ".join(clean(words).split())[:100]


def _mark(folder: Path) -> dict[str, Any]:
    return _read(folder / MARK)


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
