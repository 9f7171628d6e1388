"""The converted models in dsc's cache: what `dsc cache` lists and removes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.errors import ConfigError
from dsc_hub.inference.weights import COMPLETE
from dsc_hub.system.cache import cache_home
from dsc_hub.system.files import folder_bytes, read_object
from dsc_hub.system.locks import locked


@dataclass(frozen=True)
class ConvertedModel:
    """A folder of the cache. `about` says what it was made from; "" for one that is not complete."""

    name: str
    folder: Path
    bytes: int
    about: str


def converted_models() -> list[ConvertedModel]:
    """Return the converted models, largest first. What a killed conversion left is one, too."""
    folders = [p for p in (cache_home() / "models").glob("*") if p.is_dir() and not p.is_symlink()]
    models = [ConvertedModel(p.name, p, folder_bytes(p), _about(p)) for p in folders]
    return sorted(models, key=lambda m: (-m.bytes, m.name))


def remove_converted(names: list[str]) -> list[ConvertedModel]:
    """Remove converted models, and return them. ConfigError if one isn't there; then none is removed.

    The next run that needs one makes it anew. Waits for a process that is converting one of them.
    """
    there = {model.name: model for model in converted_models()}
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(
            f"{', '.join(unknown)}: not in {cache_home() / 'models'}; nothing was removed",
            f"There are: {', '.join(there) or 'none'}.",
        )
    for name in names:
        folder = there[name].folder
        with locked(folder.with_name(f".{name.removesuffix('.part')}.lock")):
            shutil.rmtree(folder)
    return [there[name] for name in names]


def _about(folder: Path) -> str:
    if not (folder / COMPLETE).is_file():
        return ""
    facts: dict[str, Any] = read_object(folder / COMPLETE)
    rounding = facts.get("quantization")
    kind = "rounded as training sees it" if rounding else "converted"
    return f"{facts.get('source') or facts.get('identity') or 'a model'}, {kind}"
