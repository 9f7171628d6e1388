"""A checked recipe on this machine: what it names resolved, its run folder, its account, and what is in its way.

Everything that happens before a stage runs. Nothing here takes long or writes more than run.json.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub import machine, models, progress, prompts, recipe
from dsc_hub.errors import ConfigError
from dsc_hub.recipe import Recipe
from dsc_hub.records import Prompt
from dsc_hub.runs import Run


@dataclass(frozen=True)
class Job:
    """A checked recipe and where it runs."""

    recipe: Recipe
    path: Path  # of the recipe file; prompt files lie beside it
    run: Run
    runs: Path
    model: models.BaseModel
    identity: Mapping[str, str]
    fingerprints: Mapping[str, str]

    def prompts(self, *splits: str) -> list[Prompt]:
        return [p for row in self.run.rows("prompts.jsonl") if (p := Prompt(**row)).split in splits]


def describe(path: Path, checked: Recipe, runs_folder: Path) -> Job:
    """Resolve what a checked recipe names (model, prompts, scorers) into fingerprints and a run folder. Writes nothing."""
    from dsc_hub import metrics

    model = models.identify(checked.model)
    identity = {
        "prompts": prompts.content_hash(checked.prompts, path.parent),
        "model": model.identity,
        "reward": metrics.identify(checked.reward),
        "second_scorer": metrics.identify(checked.second_scorer),
    }
    fingerprints = recipe.stage_fingerprints(checked, identity)
    return Job(
        checked,
        path,
        Run(runs_folder / checked.name / fingerprints["publish"]),
        runs_folder,
        model,
        identity,
        fingerprints,
    )


def prepare(reference: str, overrides: Sequence[str], runs_folder: Path) -> Job:
    """Find, check and resolve a recipe, and make its run folder with run.json. No stage is run yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"started with {os.environ['WORLD_SIZE']} processes, but a run has one",
            "Start one (--num_processes 1) and set distill.processes: training starts its own.",
        )
    job = describe(*load_recipe(reference, overrides), runs_folder)
    job.run.folder.mkdir(parents=True, exist_ok=True)
    old = job.run.facts if job.run["run.json"].is_file() else {}
    job.run.add_facts(
        recipe=job.recipe.model_dump(mode="json"),
        fingerprints=job.fingerprints,
        identity=job.identity,
        model=old.get("model") or job.model.as_dict(),
        versions=old.get("versions") or machine.versions(),
        hardware=old.get("hardware") or machine.hardware(),
        command=shlex.join(["dsc", "run", _plain(reference), *overrides]),
        repos=old.get("repos") or _repos(job.recipe, job.recipe.publish.owner),
        started_at=old.get("started_at") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    progress.log_to(job.run["log.txt"])
    return job


def _plain(reference: str) -> str:
    """A reference as it may be shown to others: a path of this machine becomes its last part."""
    return reference if reference.startswith("hub:") or "/" not in reference else Path(reference).name


def load_recipe(reference: str, overrides: Sequence[str]) -> tuple[Path, Recipe]:
    """`hub:USER/REPO[@REV]`, a packaged name or a path -> the file and the checked recipe. A pulled one is data: it may not
    name servers, local models or files outside its folder."""
    if not reference.startswith("hub:"):
        path = recipe.find(reference)
        return path, recipe.load(path, overrides)
    from dsc_hub import hub

    path = hub.pull_recipe(reference.removeprefix("hub:"))
    pulled = recipe.load(path)
    problems = [
        f"prompts.{k}: '{v}' is not beside the recipe"
        for k in ("path", "values")
        if (v := getattr(pulled.prompts, k)) and Path(v).name != v
    ]
    if pulled.serving.endpoints:
        problems.append("serving.endpoints: a pulled recipe may not name servers; give them on the command line")
    if Path(pulled.model.source).is_absolute() or pulled.model.source.startswith((".", "~")):
        problems.append("model.source: a pulled recipe may not name a local folder; give it on the command line")
    if problems:
        raise ConfigError(f"{reference} is refused", problems=problems)
    return path, recipe.load(path, overrides)


def _repos(checked: Recipe, owner: str | None) -> dict[str, str | None]:
    """Full names of the repos to be written. Without an account yet, the owner is a placeholder."""
    p = checked.publish
    owner = owner or ("local" if p.to == "local" else "OWNER")
    return {
        "owner": owner,
        "dataset": f"{owner}/{p.dataset or checked.name + '-dsc'}",
        "adapter": f"{owner}/{p.adapter or checked.name + '-dsc-lora'}",
        "base": f"{owner}/{p.base}" if p.base else None,
    }


@contextlib.contextmanager
def hub_account(checked: Recipe) -> Iterator[Any]:
    """The account to publish with: the embedded Hub's (running while the block does) or the user's own; None for `none`."""
    if checked.publish.to == "none":
        yield None
        return
    from dsc_hub import hub

    if checked.publish.to == "hub":
        yield hub.login(checked.publish.owner)
        return
    from dsc_hub.local_hub.server import running

    hub.prepare_for_embedded()
    with running() as address:
        yield hub.login(checked.publish.owner, address.endpoint, address.token)


def set_owner(job: Job, account: Any) -> None:
    """Record whose repos these are, and under which name and commit others can load the base model.

    A base that we publish ourselves has no commit yet when the adapter is made, so its adapter names none.
    """
    repos = _repos(job.recipe, account.owner if account else job.recipe.publish.owner)
    published_as = repos["base"] or job.model.upstream or job.model.id
    is_the_source = published_as == job.model.source
    model = job.model.as_dict() | {
        "folder": str(models.materialize(job.model)),
        "published_as": published_as,
        "published_commit": job.model.commit if is_the_source else None,
    }
    if not (repos["base"] or is_the_source):
        model["note"] = (
            f"{model['note']}; not published, so the adapter names {published_as}, whose weights may differ a little"
        )
    known = job.run.facts.get("repos", {})
    if {k: known.get(k) for k in repos} != repos:  # what publishing added stays as long as the names do
        known = {}
    job.run.add_facts(repos=known | repos, model=model)


def check(job: Job, account: Any) -> dict[str, Any]:
    """Everything that can be wrong, before hours are spent; the estimate if nothing is. ConfigError with all problems."""
    from dsc_hub import launcher, preflight

    found, dropped = prompts.load(job.recipe.prompts, job.path.parent, job.recipe.seed)
    folder = models.materialize(job.model)
    problems = preflight.too_long(job.recipe, found, folder)
    estimate = preflight.estimate(job.recipe, found, job.model.identity, folder) | {"dropped": dropped}
    problems += preflight.disk(job.runs, estimate["disk_bytes"])
    if not job.run.is_done("distill", job.fingerprints["distill"]):
        problems += launcher.check(job.recipe.distill.model_dump(mode="json"))
    if account:
        from dsc_hub import hub

        wanted = _repos(job.recipe, account.owner)
        kinds = [
            ("dataset", wanted["dataset"]),
            ("model", wanted["adapter"]),
            *([("model", wanted["base"])] if wanted["base"] else []),
        ]
        problems += hub.preflight(account, kinds, job.recipe.publish.private)
        estimate["repos"] = [f"{kind} {name}" for kind, name in kinds]
    if problems:
        n = len(problems)
        raise ConfigError(f"{job.path} can't run here: {n} problem{'s' * (n > 1)}", problems=problems)
    return estimate
