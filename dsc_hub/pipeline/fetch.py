"""Fetch all that a run of a recipe loads, so that it can run without a network; offline, name what was not fetched.

Everything is stored where the libraries look for it: models, Spaces and files in the Hub's cache, prepared datasets in
that of `datasets`, converted weights in dsc's own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dsc_hub.config.models import Place, weights_loaded
from dsc_hub.config.recipe import all_scorers, servers
from dsc_hub.config.stages import NAMES
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import ConfigError, HubError, gather
from dsc_hub.inference import base_model
from dsc_hub.metrics import registry
from dsc_hub.pipeline.context import RunContext
from dsc_hub.report.formatting import megabytes
from dsc_hub.system import addresses, cache
from dsc_hub.system.files import existing
from dsc_hub.system.progress import say


@dataclass(frozen=True)
class FetchedPart:
    """Something that a run loads.

    `place` is the recipe's key that names it. What is on no Hub has no `commit` and no `bytes`; `note` says what it is.
    """

    place: str
    name: str
    commit: str | None = None
    bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Fetched:
    """What a run loads, `servers` that it asks while it runs, and the cache folders that must be there then."""

    parts: tuple[FetchedPart, ...]
    servers: tuple[str, ...]
    caches: tuple[str, ...]


def fetch_all(context: RunContext, adapter: str | None = None) -> Fetched:
    """Download all that a run of the recipe loads, and `adapter` (hub:USER/REPO[@REVISION]) if there is one.

    ConfigError in offline mode, or if the disk is too small for it; ConfigError with all that can't be had.
    """
    from dsc_hub.hub import client

    if client.is_offline():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be fetched", "Unset it where there is a network.")
    if adapter is not None and not adapter.startswith("hub:"):
        raise ConfigError(f"--adapter {adapter}: expected hub:USER/REPO[@REVISION]")
    _check_disk(context)
    steps: dict[str, Callable[[], FetchedPart]] = {p: partial(_model, context, p) for p in _models(context)}
    steps["prompts"] = partial(_prompts, context)
    steps |= {place: partial(_scorer, context, place) for place in all_scorers(context.recipe)}
    if adapter is not None:
        steps["adapter"] = lambda: _adapter(adapter)
    parts = gather(steps, "{n} things could not be fetched")
    asked = {f"{server.place} ({addresses.host(server.address)})": None for server in servers(context.recipe)}
    return Fetched(tuple(parts.values()), tuple(asked), (*client.cache_folders(), str(cache.cache_home())))


def check_fetched(context: RunContext) -> None:
    """Raise ConfigError in offline mode with all that a run loads and that is not in the caches."""
    loads = _loads_of_hub(context)
    if not loads:
        return
    from dsc_hub.hub import client

    if not client.is_offline():
        return
    problems = []
    for place, load in loads.items():
        try:
            load()
        except HubError as e:
            problems.append(f"{place}: {e.message}")
    if problems:
        raise ConfigError(
            f"{len(problems)} thing{'s' * (len(problems) > 1)} of {context.path} could not be loaded offline",
            "Run `dsc fetch RECIPE` first, with the same overrides and HF_HOME, where there is a network.",
            problems,
        )


def _loads_of_hub(context: RunContext) -> dict[str, Callable[[], object]]:
    """Return, by place in the recipe, how each thing of the Hub that a run loads is read; offline from its cache."""
    from dsc_hub.metrics import loading

    recipe, loads = context.recipe, dict[str, Callable[[], object]]()
    for name, model in _models(context).items():
        if base_model.is_on_hub(model):
            loads[name] = partial(base_model.materialize, model, _is_loaded(context, name))
    if recipe.prompts.dataset:
        loads["prompts"] = lambda: load_prompts(
            recipe.prompts, context.path.parent, recipe.seed, context.identity["prompts"]
        )
    for place, section in all_scorers(recipe).items():
        if registry.commit_of(context.identity[place]):
            loads[place] = partial(loading.download_scorer, section, context.identity[place])
    return loads


def _models_of_hub(context: RunContext) -> Mapping[str, tuple[str, str]]:
    """Return (repo, commit) of each model of the Hub whose weights a run loads, by its place in the recipe."""
    models = {
        str(place): (model.source, model.commit)
        for place, model in _models(context).items()
        if base_model.is_on_hub(model) and _is_loaded(context, place)
    }
    for place, section in all_scorers(context.recipe).items():
        if registry.is_hub_model(section) and registry.commit_of(context.identity[place]):
            models[place] = section.scorer, str(registry.commit_of(context.identity[place]))
    return models


def downloads(context: RunContext) -> dict[str, int]:
    """Return the bytes of each model of the Hub that are still to be downloaded, by its place in the recipe."""
    from dsc_hub.hub import client

    if client.is_offline():
        return {}
    models = _models_of_hub(context)
    return {place: client.to_download(repo, commit, base_model.WANTED) for place, (repo, commit) in models.items()}


def hub_cache() -> Path:
    """Return the cache of the Hub's client."""
    from dsc_hub.hub import client

    return Path(client.cache_folders()[0])


def _check_disk(context: RunContext) -> None:
    """Say how much will be downloaded. ConfigError if the disk of the Hub's cache has less free than that."""
    models, sizes = _models_of_hub(context), downloads(context)
    for place, size in sizes.items():
        if size:
            repo, commit = models[place]
            say(f"{place}  {repo} at {commit[:12]}: {megabytes(size)} to fetch")
    needed, folder = sum(sizes.values()), hub_cache()
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise ConfigError(
            f"disk: {megabytes(free)} free at {folder}, {megabytes(needed)} to fetch",
            "Free some, or name another folder with HF_HOME.",
        )


def _models(context: RunContext) -> dict[Place, base_model.BaseModel]:
    """Return the models of which a run reads files: of one behind an API there are none."""
    return {place: model for place, model in context.models.items() if not model.is_behind_api}


def _is_loaded(context: RunContext, place: Place) -> bool:
    """Return whether a run loads the weights of a model; of a teacher at endpoints it reads the tokenizer alone."""
    return place in weights_loaded(context.recipe, NAMES)


def _model(context: RunContext, place: Place) -> FetchedPart:
    model = context.models[place]
    folder = base_model.materialize(model, _is_loaded(context, place))
    if not base_model.is_on_hub(model):
        return FetchedPart(place, model.id, note=model.note)
    return FetchedPart(place, model.source, model.commit, _bytes(folder))


def _prompts(context: RunContext) -> FetchedPart:
    from dsc_hub.hub import client

    section = context.recipe.prompts
    identity = context.identity["prompts"]
    prompts, _ = load_prompts(section, context.path.parent, context.recipe.seed, identity)
    if not section.dataset:
        return FetchedPart(
            "prompts", str(section.path or section.values), note=f"{len(prompts)} prompts, a file of the recipe"
        )
    commit = identity.rpartition("@")[2]
    return FetchedPart("prompts", section.dataset, commit, client.cached_bytes(section.dataset, "dataset", commit))


def _scorer(context: RunContext, place: str) -> FetchedPart:
    from dsc_hub.metrics import loading

    section, identity = all_scorers(context.recipe)[place], context.identity[place]
    downloaded = loading.download_scorer(section, identity)
    commit = registry.commit_of(identity)
    if downloaded is None:
        return FetchedPart(place, identity, note="needs no Hub")
    if registry.is_hub_model(section):
        return FetchedPart(place, section.scorer, commit, _bytes(downloaded))
    # The code of a Space may load more when it is loaded itself.
    loading.load_scorer(section, identity, context.path.parent)
    return FetchedPart(place, section.metric, commit, _bytes(downloaded.parent))


def _adapter(reference: str) -> FetchedPart:
    from dsc_hub.hub import client

    folder, commit = client.pull_adapter(reference.removeprefix("hub:"))
    return FetchedPart("adapter", reference.removeprefix("hub:").partition("@")[0], commit, _bytes(folder))


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
