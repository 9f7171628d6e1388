"""From what the user typed to a run's context: the recipe, what it names, and its run folder."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc_hub.config import origin, recipe_files, untrusted
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import SCORERS, Recipe, all_scorers, repo_names
from dsc_hub.data.prompts import identify
from dsc_hub.errors import ConfigError, DscError
from dsc_hub.inference import base_model
from dsc_hub.metrics import registry
from dsc_hub.pipeline.context import RunContext
from dsc_hub.runs.run import Run
from dsc_hub.runs.shards import Shard
from dsc_hub.system import hashing

# What is fixed where somebody else's adapter is scored: nothing is trained or published.
OF_ANOTHER = ("publish.to=none",)
ARMS_OF_ANOTHER = ("evaluation.arms=[base, distilled]",)  # unless the user names others


def resolve(
    reference: str, overrides: Sequence[str], runs_folder: Path, allowed_code: Sequence[str] = ()
) -> RunContext:
    """Find and check a recipe and resolve what it names (model, prompts, scorers) into fingerprints and a run folder.

    `allowed_code` names the Spaces, USER/NAME@COMMIT each, whose metric code may run here. Writes nothing. Raises one error for a
    recipe that is wrong in itself, then one with all that its names lead to.
    """
    path, checked = load_recipe(reference, overrides)
    code = registry.Code(path.parent, allowed_code)
    ways = {
        "model": lambda: base_model.identify(checked.model),
        "prompts": lambda: identify(checked.prompts, path.parent),
    } | {
        place: lambda section=section: registry.identify(section, code)
        for place, section in all_scorers(checked).items()
    }
    found: dict[str, Any] = {}
    errors: dict[str, DscError] = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except DscError as e:
            errors[name] = e
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise ConfigError(
            f"{path} names {len(errors)} things that can't be had", problems=[f"{n}: {e}" for n, e in errors.items()]
        )
    model = found["model"]
    identity = dict.fromkeys(SCORERS.values(), "") | found | {"model": model.identity}
    fingerprints = stage_fingerprints(checked, identity)
    run = Run(runs_folder / checked.name / fingerprints["publish"])
    command = shlex.join(["dsc", "run", _plain(reference), *overrides])
    names_by = named_by_others(reference, path, checked, overrides)
    return RunContext(checked, path, run, runs_folder, model, identity, fingerprints, command, names_by)


def of_shard(context: RunContext, shard: Shard) -> RunContext:
    """The job of sampling one shard, in a run folder of its own."""
    mine = dict(context.fingerprints) | {"sampling": shard.fingerprint(context.fingerprints["sampling"])}
    return replace(context, run=Run(shard.folder(context.run)), fingerprints=mine, shard=shard)


def _plain(reference: str) -> str:
    """A reference as it may be shown to others: a path of this machine becomes its last part."""
    return reference if reference.startswith("hub:") or "/" not in reference else Path(reference).name


def load_recipe(reference: str, overrides: Sequence[str]) -> tuple[Path, Recipe]:
    """`hub:USER/REPO[@REV]`, a packaged name or a path -> the file and the checked recipe.

    A recipe of somebody else, pulled now or downloaded before, is data: `untrusted` says what it may not set; ConfigError if
    it does and no override sets it anew.
    """
    if not reference.startswith("hub:"):
        path = recipe_files.find(reference)
        if where := origin.of_another(path):
            untrusted.check_downloaded(path, where, overrides)
        return path, recipe_files.load(path, overrides)
    from dsc_hub.hub import client

    repo = reference.removeprefix("hub:")
    path = client.pull_recipe(repo)
    pulled = untrusted.read(reference, path, overrides)
    for name in filter(None, (pulled.prompts.path, pulled.prompts.values)):
        client.pull_beside(path, repo, name)
    return path, recipe_files.load(path, overrides)


def named_by_others(reference: str, path: Path, checked: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    """The kinds of repos (dataset, adapter, base) whose names a recipe of somebody else chose: kind -> `targets.Stranger`. Empty
    for the user's own recipe; without the kinds that an override names anew."""
    source = reference.removeprefix("hub:") if reference.startswith("hub:") else origin.of_another(path)
    if not source:
        return {}
    from dsc_hub.hub.repos import Stranger

    keys, named = {o.partition("=")[0].strip() for o in overrides}, checked.publish
    stranger = Stranger(source, hashing.file_hash(path))
    return {
        kind: stranger
        for kind, name in repo_names(checked).items()
        # A name that the section doesn't give is made of the recipe's.
        if name and not keys & ({f"publish.{kind}", "publish"} if getattr(named, kind) else {"name"})
    }
