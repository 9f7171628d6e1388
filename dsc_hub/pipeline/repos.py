"""Check of what a run would publish, before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsc_hub.config.models import licences
from dsc_hub.config.publishing import languages
from dsc_hub.config.recipe import metric_files
from dsc_hub.inference import base_model
from dsc_hub.pipeline.context import RunContext, repos_of


def check_publishing(
    context: RunContext, account: Any, base_folder: Path | None, disk_bytes: float
) -> tuple[list[str], list[str]]:
    """Return what would be published (repos, and their size in words), and the problems of doing so."""
    from dsc_hub.hub import repos as hub_repos
    from dsc_hub.publish import metric_space

    publish, by = context.recipe.publish, context.names_by
    names = repos_of(context.recipe, account.owner)
    base = {}
    if names["base"] and base_folder:
        base = {p.name: p for pattern in base_model.WANTED for p in base_folder.glob(pattern)}
    kinds: list[tuple[str, Any, Any]] = [
        ("dataset", names["dataset"], by.get("dataset")),
        ("model", names["adapter"], by.get("adapter")),
    ]
    if names["base"]:
        stranger = by.get("base")
        kinds.append(("model", names["base"], stranger and stranger.with_weights(base.values())))
    problems, spaces = [], []
    if publish.metrics:
        files = sorted(set(metric_files(context.recipe).values()))
        problems += metric_space.check_metric_files(account, context.path.parent, files, publish)
        spaces = [f"space {account.owner}/{metric_space.name_of(file)}" for file in files]
    problems += hub_repos.check_targets(account, [hub_repos.repo_target(publish, *kind) for kind in kinds])
    if publish.collection and publish.private:
        problems += hub_repos.collection_is_public(account, publish.collection)
    problems += hub_repos.oversized(f"base '{names['base']}'", base)
    for repo_type, license in zip(("dataset", "model"), licences(context.recipe, context.base.license), strict=True):
        metadata = {"license": license or "unknown", "language": languages(publish)}
        problems += [p for p in hub_repos.check_card(account, repo_type, metadata) if p not in problems]
    total = f"at most about {disk_bytes / 1e9:.2f} GB together"
    # The weights of a Hub model are not downloaded for a plan.
    if any(name.endswith(".safetensors") for name in base):
        total += f", {sum(p.stat().st_size for p in base.values()) / 1e9:.2f} GB of it the base model"
    return [*(f"{kind} {name}" for kind, name, _ in kinds), *spaces, total], problems
