"""Recipe files: find a file, read it, apply overrides, validate the whole recipe."""

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
from dsc_hub.system import plain_yaml
from dsc_hub.system.files import packaged_folder
from dsc_hub.system.hashing import digest


def packaged_recipes() -> dict[str, Path]:
    """Return the recipes shipped with the package: name -> file.

    NAME is NAME/recipe.yaml, NAME/VARIANT is another file in the same folder.
    """
    folders = sorted(p.parent for p in packaged_folder("recipes").glob("*/recipe.yaml"))
    files = [path for folder in folders for path in [folder / "recipe.yaml", *sorted(folder.glob("*.yaml"))]]
    return {p.parent.name if p.stem == "recipe" else f"{p.parent.name}/{p.stem}": p for p in files}


def find_recipe(reference: str) -> Path:
    """Return the file for the user's input: a packaged recipe's name, a YAML file, or a folder with recipe.yaml."""
    recipes = packaged_recipes()
    path = Path(reference)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.is_file():
        return path
    if path.is_dir() and reference not in recipes:
        raise ConfigError(f"{path} is a folder without recipe.yaml", "`dsc recipes copy quickstart FOLDER` makes one.")
    if reference in recipes:
        return recipes[reference]
    parent = path.parent if path.parent.is_dir() else Path()
    beside = [str(p) for p in parent.glob("*") if p.suffix in (".yaml", ".yml") or (p / "recipe.yaml").is_file()]
    close = difflib.get_close_matches(reference.removeprefix("./"), [*recipes, *beside], n=1)
    hint = (
        f"Did you mean '{close[0]}'?"
        if close
        else f"Packaged recipes: {', '.join(recipes) or 'none'}. A path names a file, hub:USER/REPO a repo."
    )
    raise ConfigError(f"recipe '{reference}' not found: no such file and no packaged recipe of that name", hint)


def copy(name: str, folder: Path | None = None) -> tuple[Path, str]:
    """Copy a packaged recipe and the files beside it (except other variants) into a new folder.

    The default folder has the recipe's name, in the working directory. Return the folder and the name of the copy.
    ConfigError if that fails; no partial copy is left.
    """
    source = packaged_recipes().get(name)
    if source is None:
        raise (
            ConfigError(f"there is no packaged recipe '{name}'", f"There are: {', '.join(packaged_recipes())}")
            if not Path(name).exists()
            else ConfigError(f"'{name}' is a file or folder, not a packaged recipe's name: {find_recipe(name)}")
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
        shutil.rmtree(target, ignore_errors=True)  # remove the partial copy
        raise ConfigError(f"{target} can't be written: {e.args[0][0][2]}", hint) from None
    except OSError as e:
        raise ConfigError(f"{target} can't be written: {e.strerror or e}", hint) from None
    # With its own name the copy has its own folder of runs, and its own repos for dataset and adapter.
    new_name = re.sub(r"[^a-z0-9_-]+", "-", target.resolve().name.lower()).strip("-_")[:64] or source.parent.name
    text = (target / "recipe.yaml").read_text(encoding="utf-8")
    # quoted, since YAML parses 1_000 as a number
    new_text = re.sub(r"(?m)^name: *[^\s#]+", f'name: "{new_name}"', text, count=1)
    (target / "recipe.yaml").write_text(new_text, encoding="utf-8")
    return target, new_name


def load_recipe_file(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe file with `key.sub=value` overrides, whose values are YAML.

    ConfigError lists every problem.
    """
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        data = plain_yaml.load_own_yaml(text)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        line = "".join(text.splitlines()[mark.line : mark.line + 1]) if mark else ""
        raise ConfigError(
            f"{path}{position}: not valid YAML: {getattr(e, 'problem', None) or e}",
            "YAML takes no tab here: indent with spaces."
            if mark and line[mark.column :].startswith("\t")
            else "Mend that line; values with ':' or '#' need quotes.",
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
    ) as e:  # invalid dates or numbers, or too many brackets
        raise ConfigError(f"{path}: not valid YAML: {e}", "Put that value into quotes.") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: expected a mapping of sections, got {type(data).__name__}",
            "See `dsc recipes copy quickstart` for one to start from.",
        )
    if {"recipe", "vary"} <= set(data):
        raise ConfigError(f"{path} is a grid file, expected a recipe", f"Run it with `dsc grid {path}`.")
    problems = _apply_overrides(data, overrides)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as e:
        problems += messages.recipe_problems(e, Recipe)
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


def _apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `a.b=value` in `data`; return the problems."""
    if any(override.startswith("=") or override.endswith("=") for override in overrides) and len(overrides) > 1:
        joined = " ".join(overrides)
        return [f"overrides '{joined}': expected key.sub=value, without spaces around '='; quote a value with spaces"]
    return [problem for override in overrides if (problem := _apply_override(data, override))]


def _apply_override(data: dict[str, Any], override: str) -> str | None:
    """Set `a.b=value` in `data`; return the problem if that fails, else None."""
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
    """Return the command line's OPTION=VALUE arguments as a mapping of YAML values. ConfigError lists all problems."""
    data: dict[str, Any] = {}
    if problems := _apply_overrides(data, given):
        raise ConfigError("options can't be read", problems=problems)
    return data
