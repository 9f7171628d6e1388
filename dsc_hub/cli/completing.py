"""What the shell completes: names of recipes, of runs, and keys of a recipe with their values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem


def complete_recipe(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a packaged recipe's name, else a file or folder."""
    from dsc_hub.config.recipe_files import packaged_recipes

    names = [CompletionItem(name) for name in packaged_recipes() if name.startswith(begun)]
    return names or [CompletionItem(begun, type="file")]


def complete_run(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete the name of a recipe that has runs in the folder of --runs, else a folder."""
    runs = context.params.get("runs") or Path("runs")
    names = sorted(p.name for p in Path(runs).glob("*") if p.is_dir() and p.name.startswith(begun))
    return [CompletionItem(name) for name in names] or [CompletionItem(begun, type="dir")]


def complete_override(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete a key of a recipe up to its `=`, and after it the value where there are a few to choose from."""
    from dsc_hub.config.recipe import Recipe

    keys = dict(_keys(Recipe.model_json_schema()))
    key, equals, value = begun.partition("=")
    if equals:
        choices = keys.get(key, {}).get("enum", ())
        return [CompletionItem(f"{key}={choice}") for choice in choices if str(choice).startswith(value)]
    return [CompletionItem(f"{name}=", help=spec["description"]) for name, spec in keys.items() if name.startswith(key)]


def _keys(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, its schema) of all settings that hold a value."""

    def below(part: dict[str, Any], above: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, spec in part.get("properties", {}).items():
            options = (spec, *spec.get("anyOf", ()))
            sections = [schema["$defs"][o["$ref"].rpartition("/")[2]] for o in options if "$ref" in o]
            if sections:
                yield from below(sections[0], f"{above}{name}.")
            else:
                yield f"{above}{name}", spec

    return below(schema, "")
