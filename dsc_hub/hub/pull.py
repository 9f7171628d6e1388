"""Download a published repo into a folder: dataset, adapter or recipe, checked against its manifest.

The contents are treated as data. Executable file types (Python, pickles) and paths that leave the folder are skipped,
links are never created, and no existing file is overwritten.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dsc_hub.config import origin
from dsc_hub.config.origin import MANIFEST
from dsc_hub.errors import ConfigError, HubError
from dsc_hub.hub import client
from dsc_hub.system.files import read_object
from dsc_hub.system.hashing import file_hash

SUFFIXES = frozenset(".parquet .json .jsonl .yaml .yml .md .txt .csv .png .jinja .safetensors .model .log".split())
LONGEST_PATH = 240


@dataclass(frozen=True)
class Pulled:
    """A repo downloaded to `folder`: its name, its commit, and the files that were skipped."""

    repo: str
    repo_type: str  # "dataset" or "model"
    commit: str
    folder: Path
    left_out: tuple[str, ...]
    kind: str  # one of dataset, adapter, model and recipe


def pull_repo(reference: str, folder: Path | None = None) -> Pulled:
    """Download `[hub:]USER/REPO[@REV]` into `folder` (default: a folder with the repo's name in the working directory).

    ConfigError if the folder exists and is not empty; HubError if the repo does not exist, holds no file that dsc
    accepts, or does not match its manifest.
    """
    reference = reference.removeprefix("hub:")
    target = folder or Path(reference.partition("@")[0].rpartition("/")[2])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not empty", "Name another folder: nothing is overwritten.")
    contents = client.listing(reference)
    safe_names = [name for name in contents.files if is_safe(name)]
    if not safe_names:
        raise HubError(
            f"hub:{reference} holds no file that dsc takes", f"It has: {', '.join(contents.files[:5]) or 'none'}."
        )
    snapshot = client.fetch(contents, safe_names)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        _copy(contents, safe_names, snapshot, part)
        if problems := differences(part):
            raise HubError(
                f"hub:{reference} at {contents.commit[:12]} is not what its manifest says: {'; '.join(problems[:5])}"
            )
        part.replace(target)  # replaces an empty folder
    finally:
        shutil.rmtree(part, ignore_errors=True)
    left_out = tuple(n for n in contents.files if n not in safe_names)
    return Pulled(
        contents.repo, contents.repo_type, contents.commit, target, left_out, kind_of(contents.repo_type, safe_names)
    )


def _copy(there: client.Listing, names: Sequence[str], snapshot: Path, folder: Path) -> None:
    """Copy the files of a snapshot into a new folder, which is first marked as downloaded."""
    folder.mkdir(parents=True)
    origin.mark(folder, f"{there.repo}@{there.commit[:12]}")
    for name in names:
        source, copy = snapshot / name, folder / name
        # The cache's own links point into its folder.
        if not source.resolve().is_relative_to(snapshot.resolve().parent.parent):
            raise HubError(f"{name} of hub:{there.repo} leads out of its repo", "It is not taken.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def kind_of(repo_type: str, names: Collection[str]) -> str:
    """Return the kind of a repo with these files: dataset, adapter, model or recipe."""
    if repo_type == "dataset" and any(name.endswith(".parquet") for name in names):
        return "dataset"
    if "adapter_config.json" in names:
        return "adapter"
    return "model" if "config.json" in names else "recipe"


def is_safe(name: str) -> bool:
    """Return whether a repo file of this name may be written: a plain relative path to a data file, not executable."""
    path = PurePosixPath(name)
    plain = all(part not in ("..", ".") and part.isprintable() and part.strip() == part for part in path.parts)
    windows = any(c in name for c in '\\:<>"|?*')
    hidden = any(part.startswith(".") and part != ".eval_results" for part in path.parts)
    has_known_type = path.suffix in SUFFIXES or path.name == "LICENSE"
    return (
        bool(path.parts)
        and plain
        and has_known_type
        and not (windows or hidden or path.is_absolute())
        and len(name) <= LONGEST_PATH
    )


def differences(folder: Path) -> list[str]:
    """Return the differences between a folder and its manifest; empty if it has none (not published by dsc)."""
    if not (folder / MANIFEST).is_file():
        return []
    listed = read_object(folder / MANIFEST).get("files")
    if not isinstance(listed, dict) or not all(isinstance(entry, dict) for entry in listed.values()):
        return [f"{MANIFEST} lists no files"]
    problems = []
    for name, entry in sorted(listed.items()):
        file = folder / name
        if not is_safe(name):
            continue  # skipped; reported as left out
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file_hash(file) != entry.get("sha256"):
            problems.append(f"{name} has another hash")
    return problems
