"""A checked recipe on this machine: what it names resolved, its run folder, its account, and what is in its way.

Everything that happens before a stage runs; of the run folder it writes run.json and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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


def record(context: RunContext) -> None:
    """Make the run folder with its run.json; to be called with the folder's lock held.

    What was recorded when the run began stays: a later command goes on with it, and does not replace it. RunError where stages
    are finished and nothing is recorded: how they were made would be invented.
    """
    old = context.run.facts if context.run["run.json"].is_file() else {}
    if not old and (done := [s for s in NAMES if context.run.marker(s)]):
        raise RunError(
            f"{context.run['run.json']} is missing, but these stages are finished: {', '.join(done)}",
            "Put it back, or move the whole run folder away and run the recipe again.",
        )
    context.run.add_facts(
        recipe=_resolved(context.recipe),
        fingerprints=context.fingerprints,
        identity=context.identity,
        model=old.get("model") or context.model.as_dict(),
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
    """The recipe as it is carried out: a veto and a least gain that hold by default are written out."""
    data = checked.model_dump(mode="json")
    data["dataset"]["min_gain"] = least_gain(checked)
    if found := effective_veto(checked):
        data["chain"]["veto"] = found.model_dump(mode="json")
    return data


def repos_of(checked: Recipe, owner: str | None) -> dict[str, str | None]:
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


def set_owner(context: RunContext, account: Any) -> None:
    """Record whose repos these are, and under which name and commit others can load the base model.

    A base that we publish ourselves has no commit yet when the adapter is made, so its adapter names none.
    """
    repos = repos_of(context.recipe, account.owner if account else context.recipe.publish.owner)
    published_as = repos["base"] or context.model.upstream or context.model.id
    is_the_source = published_as == context.model.source
    model = context.model.as_dict() | {
        "folder": str(base_model.materialize(context.model)),
        "published_as": published_as,
        "published_commit": context.model.commit if is_the_source else None,
    }
    if not (repos["base"] or is_the_source):
        model["note"] = (
            f"{model['note']}; not published, so the adapter names {published_as}, whose weights may differ a little"
        )
    known = context.run.facts.get("repos", {})
    if {k: known.get(k) for k in repos} != repos:  # what publishing added stays as long as the names do
        known = {}
    context.run.add_facts(repos=known | repos, model=model)


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
