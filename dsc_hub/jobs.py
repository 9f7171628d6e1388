"""A checked recipe on this machine: what it names resolved, its run folder, its account, and what is in its way.

Everything that happens before a stage runs; of the run folder it writes run.json and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsc_hub.config import origin, recipe_files, untrusted
from dsc_hub.config.arms import ADAPTER, models_of
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import SCORERS, Recipe, all_scorers, least_gain, metric_files, repo_names, servers, veto
from dsc_hub.config.stages import STAGES
from dsc_hub.data.prompts import identify, load_prompts
from dsc_hub.errors import ConfigError, DscError, RunError
from dsc_hub.inference import base_model
from dsc_hub.metrics import registry
from dsc_hub.records import Prompt
from dsc_hub.runs.reuse import reusable_stages
from dsc_hub.runs.run import Run, siblings
from dsc_hub.runs.shards import Shard
from dsc_hub.system import addresses, cache, hashing, machine, progress

# What is fixed where somebody else's adapter is scored: nothing is trained or published.
OF_ANOTHER = ("publish.to=none",)
ARMS_OF_ANOTHER = ("evaluation.arms=[base, distilled]",)  # unless the user names others


@dataclass(frozen=True)
class Job:
    """A checked recipe and where it runs."""

    recipe: Recipe
    path: Path  # of the recipe file; prompt files lie beside it
    run: Run
    runs: Path
    model: base_model.BaseModel
    identity: Mapping[str, str]
    fingerprints: Mapping[str, str]
    command: str  # that does the whole of it, fit to be shown to others
    names_by: Mapping[str, Any] = field(
        default_factory=dict
    )  # kind of repo -> `targets.Stranger` whose recipe named it
    shard: Shard | None = None  # the share of the chains that this run folder is for (`of_shard`)

    def prompts(self, *splits: str) -> list[Prompt]:
        return [p for p in self.run.rows("prompts.jsonl").as_type(Prompt) if p.split in splits]


def describe(reference: str, overrides: Sequence[str], runs_folder: Path, allowed_code: Sequence[str] = ()) -> Job:
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
    return Job(checked, path, run, runs_folder, model, identity, fingerprints, command, names_by)


def of_shard(job: Job, shard: Shard) -> Job:
    """The job of sampling one shard, in a run folder of its own."""
    mine = dict(job.fingerprints) | {"sampling": shard.fingerprint(job.fingerprints["sampling"])}
    return replace(job, run=Run(shard.folder(job.run)), fingerprints=mine, shard=shard)


def record(job: Job) -> None:
    """Make the run folder with its run.json; to be called with the folder's lock held.

    What was recorded when the run began stays: a later command goes on with it, and does not replace it. RunError where stages
    are finished and nothing is recorded: how they were made would be invented.
    """
    old = job.run.facts if job.run["run.json"].is_file() else {}
    if not old and (done := [s for s in STAGES if job.run.marker(s)]):
        raise RunError(
            f"{job.run['run.json']} is missing, but these stages are finished: {', '.join(done)}",
            "Put it back, or move the whole run folder away and run the recipe again.",
        )
    job.run.add_facts(
        recipe=_resolved(job.recipe),
        fingerprints=job.fingerprints,
        identity=job.identity,
        model=old.get("model") or job.model.as_dict(),
        versions=old.get("versions") or machine.versions(),
        hardware=old.get("hardware") or machine.hardware(),
        command=old.get("command") or job.command,
        repos=old.get("repos") or _repos(job.recipe, job.recipe.publish.owner),
        started_at=old.get("started_at") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"shard": asdict(job.shard)} if job.shard else {}),
    )
    progress.log_to(job.run["log.txt"])
    for folder in (job.run.folder, cache.cache_home() / "hub"):
        progress.say_if_open(folder)


def _resolved(checked: Recipe) -> dict[str, Any]:
    """The recipe as it is carried out: a veto and a least gain that hold by default are written out."""
    data = checked.model_dump(mode="json")
    data["dataset"]["min_gain"] = least_gain(checked)
    if found := veto(checked):
        data["chain"]["veto"] = found.model_dump(mode="json")
    return data


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


def _repos(checked: Recipe, owner: str | None) -> dict[str, str | None]:
    """Full names of the repos to be written. Without an account yet, the owner is a placeholder."""
    owner = owner or ("local" if checked.publish.to == "local" else "OWNER")
    names = repo_names(checked)
    return {
        "owner": owner,
        **{kind: f"{owner}/{name}" if name else None for kind, name in names.items()},
    }


@contextlib.contextmanager
def hub_account(checked: Recipe) -> Iterator[Any]:
    """The account to publish with: the embedded Hub's (running while the block does) or the user's own; None for `none`."""
    if checked.publish.to == "none":
        yield None
        return
    with account_at(checked.publish.to, checked.publish.owner) as account:
        yield account


@contextlib.contextmanager
def account_at(to: str, owner: str | None) -> Iterator[Any]:
    """An account at the user's own Hub ("hub") or at the embedded one ("local"), which runs while the block does."""
    from dsc_hub.hub.account import login, prepare_for_embedded

    if to == "hub":
        yield login(owner)
        return
    from dsc_hub.local_hub.server import running

    prepare_for_embedded()
    with running() as address:
        yield login(owner, address.endpoint, address.token)


def set_owner(job: Job, account: Any) -> None:
    """Record whose repos these are, and under which name and commit others can load the base model.

    A base that we publish ourselves has no commit yet when the adapter is made, so its adapter names none.
    """
    repos = _repos(job.recipe, account.owner if account else job.recipe.publish.owner)
    published_as = repos["base"] or job.model.upstream or job.model.id
    is_the_source = published_as == job.model.source
    model = job.model.as_dict() | {
        "folder": str(base_model.materialize(job.model)),
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


def announce_servers(checked: Recipe) -> None:
    """Say which servers of others will be asked and which key goes to which host, before anything is sent."""
    for server in servers(checked):
        has_key = server.key_name in os.environ
        key = f"with the key in {server.key_name}" if has_key else f"without a key ({server.key_name} is not set)"
        model = f" for {server.model}" if server.model else ""
        progress.say(f"{server.place}  asks {addresses.host(server.address)}{model} {key}")
        if has_key and addresses.is_open(server.address):
            progress.say(
                f"{server.place}  the key crosses the network unencrypted; use https:// where the server has it"
            )


def check(job: Job, account: Any, last: str = "publish") -> dict[str, Any]:
    """All that can be wrong with the stages up to `last`, before hours are spent; the estimate if nothing is.

    ConfigError with all problems. Weights are not fetched for it.
    """
    from dsc_hub import preflight
    from dsc_hub.distill import launcher
    from dsc_hub.inference import servers as inference_servers

    announce_servers(job.recipe)
    if job.recipe.publish.to != "none" and not job.recipe.publish.metrics:
        for place, file in metric_files(job.recipe).items():
            progress.say(
                f"{place}  {file} stays on this machine: others can look at what is published, but not score with its recipe; "
                "publish.metrics=true publishes the file as a Space, too"
            )
    found, dropped = load_prompts(job.recipe.prompts, job.path.parent, job.recipe.seed, job.identity["prompts"])
    folder = base_model.materialize(job.model, weights=False)
    problems = preflight.too_long(job.recipe, found, folder) + preflight.without_group(job.recipe, dropped.ungrouped)
    outlook = reusable_stages(job.run, STAGES, job.fingerprints, siblings(job.runs, job.recipe.name))
    estimate = preflight.estimate(job.recipe, found, job.model.identity, folder, outlook) | {"dropped": asdict(dropped)}
    estimate["done"] = [stage for stage, where in outlook.items() if where is job.run]
    estimate["taken_over"] = {stage: str(where.folder) for stage, where in outlook.items() if where is not job.run}
    problems += preflight.disk(job.runs, estimate["disk_bytes"])
    for place, section in all_scorers(job.recipe).items():
        if wrong := registry.of_no_kind(section, found):
            problems.append(f"{place}: {wrong}")
        if section.metric == "judge":  # it may be asked for the first time hours from now
            problems += [f"{place}: {told}" for told in inference_servers.unusable(section.options)]
    inference_servers.external_critic(job.recipe.chain.critic)
    if not job.recipe.serving.endpoints:
        try:
            inference_servers.replica_places(job.recipe.serving)
        except ConfigError as e:
            problems.append(f"{e.message}; {e.hint}")
    else:
        inference_servers.external(job.recipe.serving)
        evaluates = STAGES.index(last) >= STAGES.index("evaluation")
        if evaluates and ADAPTER in models_of(job.recipe.evaluation.arms):
            problems.append(
                "serving.endpoints: servers that already run don't have the adapter; "
                "leave the distilled arms out of evaluation.arms, or leave serving.endpoints empty"
            )
    most = max(machine.cores(), len(machine.gpus()))
    if job.recipe.distill.processes > most:
        problems.append(f"distill.processes: {job.recipe.distill.processes} is more than this machine can run: {most}")
    if "distill" not in outlook:
        problems += launcher.check(job.recipe.distill.model_dump(mode="json"))
    if account:
        from dsc_hub.hub import repos as hub_repos
        from dsc_hub.publish import metric_space

        wanted, by = _repos(job.recipe, account.owner), job.names_by.get("base")
        base = {p.name: p for pattern in base_model.WANTED for p in folder.glob(pattern)} if wanted["base"] else {}
        kinds = [
            ("dataset", wanted["dataset"], job.names_by.get("dataset")),
            ("model", wanted["adapter"], job.names_by.get("adapter")),
            *([("model", wanted["base"], by and by.with_weights(base.values()))] if wanted["base"] else []),
        ]
        how, spaces = job.recipe.publish, []
        if how.metrics:
            files = sorted(set(metric_files(job.recipe).values()))
            problems += metric_space.preflight(account, job.path.parent, files, how)
            spaces = [f"space {account.owner}/{metric_space.name_of(file)}" for file in files]
        problems += hub_repos.preflight(account, [hub_repos.of(how, *kind) for kind in kinds])
        if how.collection and how.private:
            problems += hub_repos.collection_is_public(account, how.collection)
        problems += hub_repos.oversized(f"base '{wanted['base']}'", base)
        metadata = {"license": job.recipe.publish.license or job.model.license or "unknown"}
        metadata["language"] = [job.recipe.publish.language]
        for repo_type in ("dataset", "model"):
            problems += [p for p in hub_repos.check_card(account, repo_type, metadata) if p not in problems]
        total = f"at most about {estimate['disk_bytes'] / 1e9:.2f} GB together"
        if any(name.endswith(".safetensors") for name in base):  # a model of a Hub isn't fetched for a plan
            total += f", {sum(p.stat().st_size for p in base.values()) / 1e9:.2f} GB of it the base model"
        estimate["repos"] = [*(f"{kind} {name}" for kind, name, _ in kinds), *spaces, total]
    if problems:
        n = len(problems)
        raise ConfigError(f"{job.path} can't run here: {n} problem{'s' * (n > 1)}", problems=problems)
    return estimate
