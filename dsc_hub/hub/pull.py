"""Take a published repo off a Hub into a folder: dataset, adapter or recipe, checked against its manifest.

What comes is data. Files of kinds that can run (Python, pickles) and paths that would leave the folder are not taken, links are
never made, and nothing that is there already is written over.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsc_hub.config import origin
from dsc_hub.errors import ConfigError, HubError
from dsc_hub.hub import client
from dsc_hub.system.files import read_object
from dsc_hub.system.hashing import file_hash

SUFFIXES = frozenset(".parquet .json .jsonl .yaml .yml .md .txt .csv .png .jinja .safetensors .model .log".split())
LONGEST_PATH = 240


@dataclass(frozen=True)
class Pulled:
    """A repo as it lies in `folder`: which it is, at which commit, and the files that were not taken."""

    repo: str
    repo_type: str  # "dataset" or "model"
    commit: str
    folder: Path
    left_out: tuple[str, ...]
    kind: str  # what it is to us: dataset, adapter, model or recipe


def pull(reference: str, folder: Path | None = None) -> Pulled:
    """Fetch `[hub:]USER/REPO[@REV]` into `folder` (default: the repo's name, here).

    ConfigError if the folder is there and not empty; HubError if the repo isn't there, holds nothing of ours, or is not what its
    manifest says.
    """
    reference = reference.removeprefix("hub:")
    target = folder or Path(reference.partition("@")[0].rpartition("/")[2])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", "Name another folder: nothing is overwritten.")
    there = client.listing(reference)
    wanted = [name for name in there.files if is_safe(name)]
    if not wanted:
        raise HubError(
            f"hub:{reference} holds no file that dsc takes", f"It has: {', '.join(there.files[:5]) or 'none'}."
        )
    snapshot = client.fetch(there, wanted)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _copy(there, wanted, snapshot, part)
        if problems := differences(part):
            raise HubError(
                f"hub:{reference} at {there.commit[:12]} is not what its manifest says: {'; '.join(problems[:5])}"
            )
        part.replace(target)  # an empty folder gives way
    finally:
        shutil.rmtree(part, ignore_errors=True)
    left_out = tuple(n for n in there.files if n not in wanted)
    return Pulled(there.repo, there.repo_type, there.commit, target, left_out, kind_of(there.repo_type, wanted))


def _copy(there: client.Listing, names: Sequence[str], snapshot: Path, folder: Path) -> None:
    """Copy the files of a snapshot into a new folder, which is marked as downloaded before anything else is in it."""
    folder.mkdir(parents=True)
    origin.mark(folder, f"{there.repo}@{there.commit[:12]}")
    for name in names:
        source, copy = snapshot / name, folder / name
        # The cache's own links stay in its folder.
        if not source.resolve().is_relative_to(snapshot.resolve().parent.parent):
            raise HubError(f"{name} of hub:{there.repo} leads out of its repo", "It is not taken.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def kind_of(repo_type: str, names: Collection[str]) -> str:
    """What a repo with these files is to us: dataset, adapter, model or recipe."""
    if repo_type == "dataset" and any(name.endswith(".parquet") for name in names):
        return "dataset"
    if "adapter_config.json" in names:
        return "adapter"
    return "model" if "config.json" in names else "recipe"


def is_safe(name: str) -> bool:
    """May a file of this name in a repo be written here? Plain relative paths to files that hold data, none that run."""
    path = PurePosixPath(name)
    plain = all(part not in ("..", ".") and part.isprintable() and part.strip() == part for part in path.parts)
    windows = any(c in name for c in '\\:<>"|?*')
    hidden = any(part.startswith(".") and part != ".eval_results" for part in path.parts)
    known = path.suffix in SUFFIXES or path.name == "LICENSE"
    return (
        bool(path.parts)
        and plain
        and known
        and not (windows or hidden or path.is_absolute())
        and len(name) <= LONGEST_PATH
    )


def differences(folder: Path) -> list[str]:
    """Where a folder differs from the manifest in it; empty if nowhere, or if it has none (not published by dsc)."""
    if not (folder / client.MANIFEST).is_file():
        return []
    listed = read_object(folder / client.MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(of, dict) for of in listed.values()):
        return [f"{client.MANIFEST} lists no files"]
    out = []
    for name, of in sorted(listed.items()):
        file = folder / name
        if not is_safe(name):
            continue  # not taken; told as left out
        if not file.is_file():
            out.append(f"{name} is missing")
        elif file_hash(file) != of.get("sha256"):
            out.append(f"{name} has another hash")
    return out
