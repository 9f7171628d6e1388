"""The run that a command names: by its folder, its recipe's name or file, or the name of its folder."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from dsc_hub.errors import ConfigError, DscError
from dsc_hub.runs.overview import flat_settings, is_running
from dsc_hub.runs.run import Run, siblings
from dsc_hub.system import plain_yaml
from dsc_hub.system.progress import say

LEAST_ID = 6  # characters of a run folder's name that may stand for it


def find_run(reference: str, runs: Path) -> Run:
    """Return the run that `reference` names; ConfigError if there is none.

    `reference` is a run folder, or the name of one (or how it begins, with LEAST_ID characters); or a recipe's name,
    its file, or the folder of its runs. Runs are looked up under `runs`, those of a recipe's file beside it, too. Of a
    recipe's runs the newest evaluated one is returned, or the newest if none is evaluated; for a file those count whose
    settings are the file's, or are nearest to them, which is said.
    """
    named = runs_named(reference, runs)
    done = [run for run in named if run.marker("evaluation")]  # skip unfinished variants
    # Newest by start time, not by modification time: reading an old run may write into its folder.
    return _readable(max(done or named, key=_started))


def current_run(reference: str, runs: Path) -> Run:
    """Return the run that `reference` names; of a recipe's runs the one that goes on, else the one started last."""
    return _readable(max(runs_named(reference, runs), key=lambda run: (is_running(run), _started(run))))


def names_run(reference: str, runs: Path) -> bool:
    """Return whether a reference names a run: a run folder, its name, or a name (no path) of which there are runs.

    A recipe of that name, packaged or in a folder here, does not count: everywhere a name means one of its runs.
    """
    if (Path(reference) / "run.json").is_file():
        return True
    return Path(reference).name == reference and bool(siblings(runs, reference) or _with_id(reference, runs))


def runs_elsewhere(recipe_file: Path, name: str, runs: Path) -> Path | None:
    """Return the folder `runs` beside a recipe's file if runs of the recipe are there, and none are under `runs`."""
    beside = recipe_file.parent / "runs"
    if siblings(runs, name) or beside.resolve() == runs.resolve() or not siblings(beside, name):
        return None
    return beside


def runs_named(reference: str, runs: Path) -> list[Run]:
    """Return the runs that `reference` may mean (see `find_run`); ConfigError if there are none."""
    folder = Path(reference)
    if (folder / "run.json").is_file():
        return [Run(folder)]
    if named := siblings(runs, reference) or siblings(folder.parent, folder.name) or _with_id(reference, runs):
        return named
    recipe = _recipe(folder) or {}
    name, runs_beside = recipe.get("name"), (folder if folder.is_dir() else folder.parent) / "runs"
    if name and (named := siblings(runs, name) or siblings(runs_beside, name)):
        return _nearest(named, recipe, reference)
    raise ConfigError(_not_there(reference, name, runs), _where_else(name or reference, runs))


def _with_id(reference: str, runs: Path) -> list[Run]:
    """Return the run whose folder has this name (also as RECIPE/NAME), or a name that begins with it; [] without one.

    ConfigError if several runs do.
    """
    if (runs / reference / "run.json").is_file():
        return [Run(runs / reference)]
    if not reference or Path(reference).name != reference:
        return []
    folders = [path.parent for path in sorted(runs.glob("*/*/run.json"))]
    exact = [folder for folder in folders if folder.name == reference]
    begun = [f for f in folders if f.name.startswith(reference)] if len(reference) >= LEAST_ID else []
    if len(named := exact or begun) > 1:
        raise ConfigError(f"'{reference}' may be {len(named)} runs", f"Name one: {', '.join(map(str, named))}")
    return [Run(folder) for folder in named]


def _recipe(file: Path) -> dict[str, Any] | None:
    """Return what a recipe's file, or a folder's recipe.yaml, holds; None if it is none. ConfigError: can't be read."""
    file = file / "recipe.yaml" if file.is_dir() else file
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return None
    try:
        recipe = plain_yaml.load_own_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise ConfigError(f"{file} can't be read as a recipe: {e}", "`dsc plan` says more.") from None
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("name"), str) else None


def _nearest(named: list[Run], recipe: dict[str, Any], reference: str) -> list[Run]:
    """Return the runs whose settings differ least from those that a recipe's file holds, and say what differs."""
    settings = flat_settings(recipe)
    differ = []
    for run in named:
        recorded = flat_settings(run.facts.recipe.model_dump(mode="json"))
        differ.append([key for key, value in settings.items() if key in recorded and recorded[key] != value])
    least = min(map(len, differ))
    nearest = [run for run, keys in zip(named, differ, strict=True) if len(keys) == least]
    if least:
        keys = differ[named.index(nearest[0])]
        say(f"{reference}  no run has its settings; the nearest differs in {', '.join(keys[:4])}")
    return nearest


def _not_there(reference: str, name: str | None, runs: Path) -> str:
    where = runs.resolve()
    if name:
        return f"{reference}: there is no run of the recipe '{name}' in {where}"
    return f"'{reference}' is neither a run folder (no run.json in it) nor a recipe with a run in {where}"


def _where_else(name: str, runs: Path) -> str:
    recipes = sorted(p.name for p in runs.glob("*") if siblings(runs, p.name)) if runs.is_dir() else []
    hints = []
    if close := difflib.get_close_matches(name, recipes, n=1, cutoff=0.7):
        hints.append(f"Did you mean '{close[0]}'?")
    elif recipes:
        hints.append(f"Runs of these recipes are there: {', '.join(recipes)}.")
    near = [
        Path("runs"),
        Path("..") / "runs",
        *sorted(p / "runs" for p in Path().glob("*") if p.is_dir() and not p.is_symlink()),
    ]
    if other := next((folder for folder in near if siblings(folder, name)), None):
        hints.append(f"There are runs of '{name}' in {other}: --runs {other}")
    return " ".join(hints) or "`dsc run RECIPE` makes one; --runs names another folder of runs."


def _started(run: Run) -> str:
    try:
        return str(run.raw_facts.get("started_at", ""))
    except DscError:
        return ""  # damaged: `_readable` says so, if it is the one


def _readable(run: Run) -> Run:
    """Return the run if its run.json is valid; else RunError."""
    _ = run.facts
    return run
