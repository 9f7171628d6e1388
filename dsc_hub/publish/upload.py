"""Publish a finished run to a Hub: dataset, adapter and, if it is on no Hub yet, the base model. One commit each.

Each commit is read back. The files are assembled as plain maps (path in the repo -> local file), so that they can be
inspected and tested without a Hub.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc_hub.config.models import base_place
from dsc_hub.config.publishing import PublishConfig
from dsc_hub.config.recipe import metric_files
from dsc_hub.errors import HubError, RunError
from dsc_hub.hub import push
from dsc_hub.hub import repos as hub_repos
from dsc_hub.hub.account import Account, web_address
from dsc_hub.publish import metric_space
from dsc_hub.publish.bundle import check_no_paths, model_folders, trees
from dsc_hub.runs.facts import RunFacts
from dsc_hub.runs.run import Run
from dsc_hub.system.hashing import file_hash
from dsc_hub.system.progress import say


def publish_run(
    run: Run,
    account: Account,
    model_folder: Path | None,
    recipe_folder: Path,
    settings: PublishConfig,
    render_cards: Callable[[], Any],
    names_by: Mapping[str, hub_repos.Stranger] | None = None,
) -> dict[str, Any]:
    """Push all repos and return {kind: {repo, type, commit, address, files, bytes}}. Idempotent.

    `model_folder` has the weights of the base, if it is published. `settings` holds the options (private, branch, tag,
    collection); run.json holds the repo names. `names_by` maps each kind of repo whose name comes from a third-party
    recipe to that recipe. The adapter references dataset and base at their commits, which are known only after these
    are pushed: `render_cards` is called in between.
    """
    facts, recorded = run.facts, run.raw_facts
    repos = recorded["repos"]
    out: dict[str, dict[str, Any]] = {}
    render_cards()  # stored cards may be reused, or rendered without an account
    local = [str(run.folder.resolve()), *model_folders(facts), str(recipe_folder.resolve()), f"{Path.home()}/"]
    with tempfile.TemporaryDirectory() as work:
        planned = trees(run, model_folder, recipe_folder, Path(work))
        metric_files = _metric_files(facts, recipe_folder, Path(work)) if settings.metrics else {}
        _check_result({**planned, **{file: ("space", made) for file, made in metric_files.items()}}, local, account)
        spaces = {file: _publish_metric(account, file, made, settings) for file, made in metric_files.items()}
        run.add_facts(spaces={file: {"repo": s["repo"], "commit": s["commit"]} for file, s in spaces.items()})
        for kind in planned:
            if kind == "adapter":
                base_commit = {"published_commit": out["base"]["commit"]} if "base" in out else {}
                place = base_place(facts.recipe)
                base = {place: recorded[place] | base_commit}
                run.add_facts(repos=repos | {"dataset_revision": out["dataset"]["commit"]}, **base)
                render_cards()
            repo_type, files = trees(run, model_folder, recipe_folder, Path(work))[kind]
            check_no_paths(files, local)
            size = sum(p.stat().st_size for p in files.values())
            visibility = "private" if settings.private else "PUBLIC"
            say(f"publish  {kind} -> {repos[kind]}  {len(files)} files  {size / 1e6:.1f} MB  {visibility}")
            target = hub_repos.repo_target(settings, repo_type, repos[kind], stranger := (names_by or {}).get(kind))
            if kind == "base":
                target = replace(target, gated=None, named_by=stranger and stranger.with_weights(files.values()))
            try:
                commit = push.push(account, target, files, f"{facts.recipe.name}: {kind} by dsc", Path(work))
            except HubError as e:
                published = (f"Published: {k} at {repo['address']}." for k, repo in out.items())
                raise HubError(e.message, " ".join([e.hint, *published])) from None
            out[kind] = {
                "repo": repos[kind],
                "type": repo_type,
                "commit": commit,
                "files": len(files),
                "bytes": size,
                "address": web_address(account, repo_type, repos[kind]),
            }
    out |= {f"metric {Path(file).stem}": space for file, space in spaces.items()}
    if settings.collection:
        items = [(entry["type"], entry["repo"]) for entry in out.values()]
        push.add_to_collection(account, settings.collection, items, settings.private)
    return out


def _metric_files(facts: RunFacts, folder: Path, work: Path) -> dict[str, dict[str, Path]]:
    """Return the Space files of the recipe's metric files: {metric file: {path in the Space: local file}}.

    RunError if a metric file has changed since it scored the run.
    """
    out = {}
    for place, file in metric_files(facts.recipe).items():
        if f"(file {file_hash(folder / file)[:12]})" not in facts.identity[place]:
            raise RunError(
                f"{file} was changed since it scored this run ({place})", "Put it back, or run the recipe again."
            )
        name = metric_space.name_of(file)
        out[file] = metric_space.files(str(folder / file), name, work / f"metric-{name}")
    return out


def _publish_metric(account: Account, file: str, made: Mapping[str, Path], settings: PublishConfig) -> dict[str, Any]:
    target = metric_space.space(account, metric_space.name_of(file), settings.private, settings.overwrite)
    say(f"publish  metric {file} -> {target.repo}  {'private' if settings.private else 'PUBLIC'}")
    return metric_space.put(account, target, made, file) | {"type": "space"}


def _check_result(
    planned: Mapping[str, tuple[str, Mapping[str, Path]]], local: Sequence[str], account: Account
) -> None:
    """Check all files before the first upload.

    RunError for a local path; HubError with every card that the Hub refuses and every file that is too large.
    """
    problems = []
    for kind, (repo_type, files) in planned.items():
        check_no_paths(files, local)
        problems += hub_repos.oversized(kind, files)
        card = files["README.md"].read_text(encoding="utf-8")
        problems += [f"{kind}: {p}" for p in hub_repos.check_readme(account, repo_type, card)]
    if problems:
        raise HubError("\n  ".join(["this can't be published:", *problems]), "Nothing was sent.")
