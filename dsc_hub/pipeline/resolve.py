"""Resolve the user's input into a run context: load the recipe, resolve its names, locate its run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dsc_hub.config import origin, recipe_files, untrusted
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import SCORERS, Recipe, all_scorers, repo_names
from dsc_hub.config.sampling import PLACEHOLDERS
from dsc_hub.data.prompts import identify_prompts
from dsc_hub.distill import launcher, plugin
from dsc_hub.errors import ConfigError, gather
from dsc_hub.inference import base_model
from dsc_hub.metrics import registry
from dsc_hub.pipeline.context import RunContext
from dsc_hub.runs.lookup import runs_elsewhere
from dsc_hub.runs.run import Run
from dsc_hub.runs.shards import Shard
from dsc_hub.system import hashing
from dsc_hub.system.launch import world_size
from dsc_hub.system.progress import say_once

_IN_BRACES = re.compile(
    r"(?<![\\\w{}])\{(\w{2,})\}(?!\})"
)  # a word; behind a letter or a backslash it is LaTeX or code
# Overrides for scoring a third-party adapter: nothing is trained or published.
OF_ANOTHER = ("publish.to=none",)
ARMS_OF_ANOTHER = ("evaluation.arms=[base, distilled]",)  # unless the user sets other arms


def resolve_recipe(
    reference: str, overrides: Sequence[str], runs_folder: Path, allowed_code: Sequence[str] = ()
) -> RunContext:
    """Find and check a recipe; resolve its model, prompts and scorers into fingerprints and a run folder.

    `allowed_code` lists the Spaces (USER/NAME@COMMIT) whose metric code may run here. Writes nothing. Raises one error
    for an invalid recipe, or else one error with all names that cannot be resolved.
    """
    path, checked = load_recipe(reference, overrides)
    checked = _with_processes(checked)
    _check_braces(checked)
    if beside := runs_elsewhere(path, checked.name, runs_folder):
        say_once(
            f"runs of this recipe are in {beside}, and none in {runs_folder.resolve()}, which this command looks at: "
            f"--runs {beside} goes on with them"
        )
    code = registry.Code(path.parent, allowed_code)
    models = {"model": checked.model} | ({"student": checked.student} if checked.student else {})
    resolvers: dict[str, Callable[[], Any]] = {
        place: partial(base_model.identify_model, section) for place, section in models.items()
    }
    resolvers["prompts"] = lambda: identify_prompts(checked.prompts, path.parent)
    for place, scorer in all_scorers(checked).items():
        resolvers[place] = partial(registry.identify_scorer, scorer, code)
    resolved = gather(resolvers, f"{path} names {{n}} things that can't be had")
    identified = {place: resolved[place] for place in models}
    identity = dict.fromkeys(SCORERS.values(), "") | resolved | {place: m.identity for place, m in identified.items()}
    fingerprints = stage_fingerprints(checked, identity)
    run = Run(runs_folder / checked.name / fingerprints["publish"])
    command = shlex.join(["dsc", "run", _plain_reference(reference), *overrides])
    names_by = named_by_others(reference, path, checked, overrides)
    return RunContext(
        checked,
        path,
        run,
        runs_folder,
        identified["model"],
        identity,
        fingerprints,
        command,
        names_by,
        student=identified.get("student"),
    )


def _check_braces(recipe: Recipe) -> None:
    """Say which words in braces of the chain's texts are sent as they are; ConfigError if one is a column's name."""
    p, problems = recipe.prompts, []
    columns = {p.column: "prompt", p.kind_column: None, p.tools_column: None, p.group_column: "group"}
    known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
    for key, texts in zip(("critique", "revision"), map(" ".join, zip(*recipe.chain.pairs, strict=True)), strict=True):
        for column, name in columns.items():
            if column and column not in PLACEHOLDERS and f"{{{column}}}" in texts:
                instead = f"; that column is {{{name}}}" if name else ""
                problems.append(f"chain.{key}: {{{column}}} is a column and no placeholder{instead}. There are {known}")
        for word in dict.fromkeys(_IN_BRACES.findall(texts)):
            if word not in (*PLACEHOLDERS, *columns):
                say_once(f"chain.{key}  {{{word}}} is sent as it is: it is no placeholder. There are {known}")
    for word in _IN_BRACES.findall(recipe.chain.system or ""):
        say_once(f"chain.system  {{{word}}} is sent as it is: a system text has no placeholders")
    if problems:
        raise ConfigError("a text of the chain has a placeholder that is not known", problems=problems)


def _with_processes(recipe: Recipe) -> Recipe:
    """Return the recipe with the number of training processes that a launcher, or `distill.launch`, brings.

    ConfigError if the recipe asks for another number.
    """
    section = recipe.distill
    if recipe.rounds > 1 and world_size() > 1:
        raise ConfigError(
            "rounds: a launcher's processes take part in one training only",
            "Start one process, and name the launcher's configuration with distill.launch.",
        )
    if (processes := world_size()) > 1:
        source = "the launcher started"
        plugin.check_launched(recipe)
    elif section.launch is not None:
        processes, source = launcher.processes_of(section.launch, recipe), f"{section.launch} is for"
    else:
        return recipe
    if section.processes not in (1, processes):
        raise ConfigError(
            f"distill.processes is {section.processes}, and {source} {processes}",
            "Leave distill.processes out: the number is taken from there.",
        )
    return recipe.model_copy(update={"distill": section.model_copy(update={"processes": processes})})


def of_shard(context: RunContext, shard: Shard) -> RunContext:
    """Return the context for sampling one shard, in its own run folder. ConfigError for a recipe with rounds, rows
    or a budget."""
    if context.recipe.rounds > 1:
        raise ConfigError("rounds: each round samples and trains, so shards can't be put together", "Set rounds=1.")
    if context.recipe.ends_early:
        raise ConfigError(
            "dataset.rows and budget: a shard doesn't know what the others have sampled",
            "Set dataset.rows=null and budget=null, and chain.chains_per_prompt to what is wanted.",
        )
    fingerprints = dict(context.fingerprints) | {"sampling": shard.fingerprint(context.fingerprints["sampling"])}
    return replace(context, run=Run(shard.folder(context.run)), fingerprints=fingerprints, shard=shard)


def _plain_reference(reference: str) -> str:
    """Return a reference that is safe to publish: a local path is reduced to its last part."""
    return reference if reference.startswith("hub:") or "/" not in reference else Path(reference).name


def load_recipe(reference: str, overrides: Sequence[str]) -> tuple[Path, Recipe]:
    """Load `hub:USER/REPO[@REV]`, a packaged name or a path; return the file and the checked recipe.

    A third-party recipe, pulled now or downloaded before, is untrusted data: `untrusted` defines the keys that it must
    not set. ConfigError if it sets one and no override replaces it.
    """
    if not reference.startswith("hub:"):
        path = recipe_files.find_recipe(reference)
        if where := origin.of_another(path):
            untrusted.check_downloaded(path, where, overrides)
        return path, recipe_files.load_recipe_file(path, overrides)
    from dsc_hub.hub import client

    repo = reference.removeprefix("hub:")
    path = client.pull_recipe(repo)
    pulled = untrusted.read_untrusted(reference, path, overrides)
    for name in filter(None, (pulled.prompts.path, pulled.prompts.values)):
        client.pull_beside(path, repo, name)
    return path, recipe_files.load_recipe_file(path, overrides)


def named_by_others(reference: str, path: Path, checked: Recipe, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the kinds of repos (dataset, adapter, base) named by a third-party recipe, as kind -> `Stranger`.

    Empty for the user's own recipe. Kinds whose name an override replaces are left out.
    """
    source = reference.removeprefix("hub:") if reference.startswith("hub:") else origin.of_another(path)
    if not source:
        return {}
    from dsc_hub.hub.repos import Stranger

    keys, named = {o.partition("=")[0].strip() for o in overrides}, checked.publish
    stranger = Stranger(source, hashing.file_hash(path))
    return {
        kind: stranger
        for kind, name in repo_names(checked).items()
        # A name that the section does not set derives from the recipe's name.
        if name and not keys & ({f"publish.{kind}", "publish"} if getattr(named, kind) else {"name"})
    }
