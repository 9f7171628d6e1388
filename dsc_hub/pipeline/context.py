"""The run context: a checked recipe with its resolved model, prompts and scorers, its run folder and its Hub account.

Covers everything before a stage runs. In the run folder it writes only run.json and log.txt.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsc_hub.config.models import Place, base_place, weights_loaded
from dsc_hub.config.recipe import Recipe, effective_veto, least_gain, repo_names, servers
from dsc_hub.config.stages import NAMES
from dsc_hub.errors import RunError
from dsc_hub.inference import base_model
from dsc_hub.records import Prompt
from dsc_hub.runs.run import Run
from dsc_hub.runs.shards import Shard
from dsc_hub.system import addresses, cache, machine, progress


@dataclass(frozen=True)
class RunContext:
    """A checked recipe with its resolved names, fingerprints and run folder."""

    recipe: Recipe
    path: Path  # the recipe file; prompt files lie beside it
    run: Run
    runs: Path
    model: base_model.BaseModel  # writes the chains
    identity: Mapping[str, str]
    fingerprints: Mapping[str, str]
    command: str  # command that runs the whole recipe; contains no local paths
    names_by: Mapping[str, Any] = field(default_factory=dict)  # kind of repo -> `Stranger` whose recipe named it
    adapter: Path | None = None  # of the round before, which samples instead of the base (rounds.py)
    shard: Shard | None = None  # the shard that this run folder holds (`of_shard`); None: the whole run
    student: base_model.BaseModel | None = None  # is trained in the place of `model`

    @property
    def base(self) -> base_model.BaseModel:
        """The model that is trained, and that the adapter lies on."""
        return self.student or self.model

    @property
    def models(self) -> dict[Place, base_model.BaseModel]:
        """Both models by the section of the recipe that names them."""
        return {"model": self.model, "student": self.student} if self.student else {"model": self.model}

    def prompts(self, *splits: str) -> list[Prompt]:
        return [p for p in self.run.rows("prompts.jsonl").as_type(Prompt) if p.split in splits]


def record(context: RunContext) -> None:
    """Create or update run.json in the run folder. Call it with the folder's lock held.

    Model, versions, hardware, command, repos and start time keep the values of the first session; a later command does
    not replace them. RunError if stages are finished but run.json is missing, since their origin is then unknown.
    """
    old = context.run.raw_facts if context.run["run.json"].is_file() else {}
    if not old and (done := [s for s in NAMES if context.run.marker(s)]):
        raise RunError(
            f"{context.run['run.json']} is missing, but these stages are finished: {', '.join(done)}",
            "Put it back, or move the whole run folder away and run the recipe again.",
        )
    context.run.add_facts(
        recipe=_resolved(context.recipe),
        fingerprints=context.fingerprints,
        identity=context.identity,
        **{place: old.get(place) or model.as_dict() for place, model in context.models.items()},
        versions=old.get("versions") or machine.versions(),
        hardware=old.get("hardware") or machine.hardware(),
        command=old.get("command") or context.command,
        repos=old.get("repos") or repos_of(context.recipe, context.recipe.publish.owner),
        started_at=old.get("started_at") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"shard": asdict(context.shard)} if context.shard else {}),
    )
    progress.log_to(context.run["log.txt"])
    for folder in (context.run.folder, cache.cache_home() / "hub"):
        progress.say_if_open(folder)


def _resolved(checked: Recipe) -> dict[str, Any]:
    """Return the effective recipe as plain data: default veto and minimum gain are written out."""
    data = checked.model_dump(mode="json")
    data["dataset"]["min_gain"] = least_gain(checked)
    if veto := effective_veto(checked):
        data["chain"]["veto"] = veto.model_dump(mode="json")
    return data


def repos_of(checked: Recipe, owner: str | None) -> dict[str, str | None]:
    """Return the full names of the repos to publish. Without an account the owner is a placeholder."""
    owner = owner or ("local" if checked.publish.to == "local" else "OWNER")
    names = repo_names(checked)
    return {
        "owner": owner,
        **{kind: f"{owner}/{name}" if name else None for kind, name in names.items()},
    }


@contextlib.contextmanager
def hub_account(checked: Recipe) -> Iterator[Any]:
    """Yield the account for publishing: of the embedded Hub (running inside the block) or the user's; None for none."""
    if checked.publish.to == "none":
        yield None
        return
    with account_at(checked.publish.to, checked.publish.owner) as account:
        yield account


@contextlib.contextmanager
def account_at(to: str, owner: str | None) -> Iterator[Any]:
    """Yield an account at the user's Hub ("hub") or at the embedded one ("local"), which runs inside the block."""
    from dsc_hub.hub.account import login, prepare_for_embedded

    if to == "hub":
        yield login(owner)
        return
    from dsc_hub.local_hub.server import running

    with running() as address:
        prepare_for_embedded(address.endpoint)
        yield replace(login(owner, address.endpoint, address.token), is_embedded=True)


def set_owner(context: RunContext, account: Any, stages: Iterable[str] = NAMES) -> None:
    """Record the owner of the repos, the weights that `stages` load, and how others can load the models.

    Weights are fetched only for these stages. A base model that this run publishes has no commit yet when the adapter
    is trained, so the adapter names none.
    """
    repos = repos_of(context.recipe, account.owner if account else context.recipe.publish.owner)
    recorded, loaded = context.run.raw_facts, weights_loaded(context.recipe, stages)
    models = {}
    for place, model in context.models.items():
        folder = str(base_model.materialize(model)) if place in loaded else recorded.get(place, {}).get("folder")
        is_base = place == base_place(context.recipe)
        models[place] = model.as_dict() | {"folder": folder} | _published(model, repos["base"], is_base)
    before = recorded.get("repos", {})
    if {k: before.get(k) for k in repos} != repos:  # keep what publishing added only while the names are the same
        before = {}
    context.run.add_facts(repos=before | repos, **models)


def _published(model: base_model.BaseModel, base_repo: str | None, is_base: bool) -> dict[str, Any]:
    """Return name and commit under which others can load a model, and, if the base's weights differ, a note on that."""
    published_as = (base_repo if is_base else None) or model.upstream or model.id
    is_the_source = published_as == model.source
    out = {"published_as": published_as, "published_commit": model.commit if is_the_source else None}
    if is_base and not (base_repo or is_the_source):
        out["note"] = (
            f"{model.note}; not published, so the adapter names {published_as}, whose weights may differ a little"
        )
    return out


def record_servers(context: RunContext) -> None:
    """Record in run.json what this process has learned of the servers of others; nothing if it asked none."""
    from dsc_hub.inference import external

    if learned := external.connections(context.recipe):
        places = {c.place for c in learned}
        kept = [s for s in context.run.raw_facts.get("servers", []) if s["place"] not in places]
        context.run.add_facts(servers=[*kept, *map(_recorded_server, learned)])


def _recorded_server(learned: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(learned).items() if key != "parameters"}


def announce_servers(checked: Recipe) -> None:
    """Report the external servers and which key is sent to which host, before the first request."""
    for server in servers(checked):
        has_key = server.key_name in os.environ
        key = f"with the key in {server.key_name}" if has_key else f"without a key ({server.key_name} is not set)"
        model = f" for {server.model}" if server.model else ""
        progress.say(f"{server.place}  asks {addresses.host(server.address)}{model} {key}")
        if has_key and addresses.is_open(server.address):
            progress.say(
                f"{server.place}  the key crosses the network unencrypted; use https:// where the server has it"
            )
