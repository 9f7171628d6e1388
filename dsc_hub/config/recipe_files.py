"""Recipe files: find the one that is meant, read it, override keys, check it whole."""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dsc_hub.config import messages
from dsc_hub.config.recipe import Recipe, repo_names
from dsc_hub.errors import ConfigError
from dsc_hub.system.files import packaged_folder
from dsc_hub.system.hashing import digest


def packaged_recipes() -> dict[str, Path]:
    """Names of the recipes that travel with the package, and their files: NAME is NAME/recipe.yaml, NAME/VARIANT another file
    beside it."""
    folders = sorted(p.parent for p in packaged_folder("recipes").glob("*/recipe.yaml"))
    found = [path for folder in folders for path in [folder / "recipe.yaml", *sorted(folder.glob("*.yaml"))]]
    return {p.parent.name if p.stem == "recipe" else f"{p.parent.name}/{p.stem}": p for p in found}


def find(reference: str) -> Path:
    """The file behind what the user typed: a packaged recipe's name, a YAML file, or a folder that holds recipe.yaml."""
    named = packaged_recipes()
    path = Path(reference)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if reference in named:
        return named[reference]
    close = difflib.get_close_matches(reference, named, n=1)
    hint = (
        f"Did you mean '{close[0]}'?"
        if close
        else f"Packaged recipes: {', '.join(named) or 'none'}. A path names a file, hub:USER/REPO a repo."
    )
    raise ConfigError(f"recipe '{reference}' not found: no such file and no packaged recipe of that name", hint)


def copy(name: str, folder: Path | None = None) -> tuple[Path, str]:
    """Copy a packaged recipe and the files beside it (other variants apart) into a new folder, by default one of its name here.
    The folder and the name that the copy has; ConfigError, and no half of a copy, if it can't be."""
    source = packaged_recipes().get(name)
    if source is None:
        raise (
            ConfigError(f"there is no packaged recipe '{name}'", f"There are: {', '.join(packaged_recipes())}")
            if not Path(name).exists()
            else ConfigError(f"'{name}' is a file or folder, not a packaged recipe's name: {find(name)}")
        )
    target = folder or Path(name.replace("/", "-"))
    hint = "Name a FOLDER that can be made and written to."
    try:
        if target.exists():
            raise ConfigError(f"{target} exists", "Name another folder: nothing is overwritten.")
        shutil.copytree(
            source.parent,
            target,
            ignore=lambda _, there: {n for n in there if n.endswith(".yaml") and n != source.name},
        )
        (target / source.name).replace(target / "recipe.yaml")
    except shutil.Error as e:  # (from, to, why) of every file that could not be copied
        shutil.rmtree(target, ignore_errors=True)  # half a recipe is none
        raise ConfigError(f"{target} can't be written: {e.args[0][0][2]}", hint) from None
    except OSError as e:
        raise ConfigError(f"{target} can't be written: {e.strerror or e}", hint) from None
    # Under a name of its own, the copy has its own folder of runs, and its own repos for dataset and adapter.
    own = re.sub(r"[^a-z0-9_-]+", "-", target.resolve().name.lower()).strip("-_")[:64] or source.parent.name
    text = (target / "recipe.yaml").read_text(encoding="utf-8")
    named = re.sub(r"(?m)^name: *[^\s#]+", f'name: "{own}"', text, count=1)  # in quotes: YAML takes 1_000 for a number
    (target / "recipe.yaml").write_text(named, encoding="utf-8")
    return target, own


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file with `key.sub=value` overrides (values are YAML). Raises ConfigError with every problem."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{at}: not valid YAML: {getattr(e, 'problem', None) or e}",
            "Mend that line; values with ':' or '#' need quotes.",
        ) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (
        ValueError,
        RecursionError,
        LookupError,
        AttributeError,
        TypeError,
        OverflowError,
    ) as e:  # what YAML takes for a date or a number and is none, or no end of brackets
        raise ConfigError(f"{path}: not valid YAML: {e}", "Put that value into quotes.") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections, got {type(data).__name__}",
            "See `dsc recipes copy quickstart` for one to start from.",
        )
    problems = [p for o in overrides if (p := _apply_override(data, o))]
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        problems += messages.problems(e, Recipe)
    else:
        names = repo_names(recipe)
        if names["base"] == names["adapter"]:
            problems.append(f"publish: adapter and base are both '{names['base']}'; they need a repo each")
        try:
            digest(recipe.model_dump(mode="json"))
        except (UnicodeError, ValueError):
            problems.append("a text holds characters that can't be written as UTF-8")
    if problems:
        n = len(problems)
        raise ConfigError(f"{path} has {n} problem{'s' * (n > 1)}", problems=problems)
    return recipe


def _apply_override(data: dict[str, Any], override: str) -> str | None:
    """Set `a.b=value` in `data`; a problem in words if it can't be."""
    key, sep, raw = override.partition("=")
    if not sep or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
        return f"override '{override}': expected key.sub=value"
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"override '{override}': the value is not valid YAML; quote it"
    node, (*parents, last) = data, key.strip().split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            return f"override '{override}': '{part}' is not a section"
    node[last] = value
    return None


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """OPTION=VALUE of the command line as a mapping (values are YAML). ConfigError with every problem."""
    data: dict[str, Any] = {}
    if problems := [p for one in given if (p := _apply_override(data, one))]:
        raise ConfigError("options can't be read", problems=problems)
    return data
