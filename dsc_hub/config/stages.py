"""The stages of a run, in order: one table. A new stage is one entry here and one function in `pipeline/stages.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Inputs:
    """What fingerprints are made of: the recipe, and what the names in it stand for.

    `recipe` is without its defaults, so that a dsc with a new setting goes on with what an older one did. `identity` maps
    `prompts`, `model` and each scorer's place to a hash, commit or version; "" for a scorer that the recipe doesn't have.
    `more_scorers` are the identities of further terms of the reward and of the veto's likeness.
    """

    recipe: Mapping[str, Any]
    identity: Mapping[str, str]
    more_scorers: tuple[str, ...]
    seed: int
    name: str
    description: str

    def section(self, name: str, *left_out: str) -> dict[str, Any]:
        return {k: v for k, v in (self.recipe.get(name) or {}).items() if k not in left_out}


@dataclass(frozen=True)
class Stage:
    """One stage. Everything that the rest of dsc_hub needs to know of it."""

    name: str
    command: str  # that runs it: `dsc COMMAND RECIPE`
    version: int  # goes up when a default of its settings, or what it does, changes: older runs do it again
    inputs: Callable[[Inputs], list[Any]]  # its own part of its fingerprint, beside what the stages before it have
    files: tuple[str, ...] = ()  # what it leaves behind; without the first one it isn't done. Empty: never reused
    sections: tuple[str, ...] = ()  # of metrics.json; the first one is its result
    stale_files: tuple[str, ...] = ()  # of later stages, which don't hold once it is done again
    shows_judgements: bool = False  # made from what people judged: to be made again after `dsc blind`
    is_timed: bool = True  # are its seconds a number of metrics.json?


def _sampling(i: Inputs) -> list[Any]:
    # Context is in: it decides which prompts fit. Endpoints are in: another server may hold another model. How fast the
    # work is done (concurrency, memory, batches of a scorer) is out.
    serving = {k: v for k, v in i.section("serving").items() if k in ("context", "endpoints", "served_model")}
    texts = (i.section("chain"), i.section("hygiene"), i.section("generation"))
    return [
        i.identity["model"],
        *texts,
        serving,
        i.section("reward", "batch_size"),
        i.identity["reward"],
        *i.more_scorers,
    ]


def _evaluation(i: Inputs) -> list[Any]:
    scorers = ("second_scorer", "third_scorer")
    return [i.section("evaluation"), *(part for s in scorers for part in (i.section(s, "batch_size"), i.identity[s]))]


STAGES = (
    Stage(
        "prompts",
        command="sample",
        version=3,
        inputs=lambda i: [i.section("prompts"), i.identity["prompts"], i.seed],
        files=("prompts.jsonl",),
        sections=("prompts",),
    ),
    Stage(
        "sampling",
        command="sample",
        version=5,
        inputs=_sampling,
        files=("chains.jsonl", "turns.jsonl", "failed.jsonl", "sessions.jsonl"),
        sections=("sampling",),
    ),
    Stage(
        "dataset",
        command="dataset",
        version=3,
        inputs=lambda i: [i.section("dataset")],
        files=("dataset/sft", "dataset/preference", "dataset/chains"),
        sections=("dataset",),
    ),
    Stage(
        "distill",
        command="distill",
        version=2,
        inputs=lambda i: [i.section("distill")],  # the number of processes is in: it multiplies the batch
        files=("adapter",),
        sections=("distill",),
        stale_files=tuple(
            f"evaluation/distilled.{rows}.jsonl" for rows in ("turns", "chains", "failed", "unanswered", "seconds")
        ),
    ),
    Stage(
        "evaluation",
        command="evaluate",
        version=8,
        inputs=_evaluation,
        files=("evaluation", "dataset/evaluation"),
        sections=("evaluation", "test_set", "blind"),
    ),
    Stage(
        "report",
        command="report",
        version=3,
        inputs=lambda i: [i.name, i.description],
        files=("report.html",),
        shows_judgements=True,
    ),
    Stage(
        "cards",
        command="report",
        version=3,
        inputs=lambda i: [i.section("publish"), i.section("model")],
        files=("cards",),
        shows_judgements=True,
    ),
    Stage(
        "publish",
        command="publish",
        version=1,
        inputs=lambda i: [],
        shows_judgements=True,
        is_timed=False,  # metrics.json is published itself: it must not change by being published
    ),
)
NAMES = tuple(stage.name for stage in STAGES)
BY_NAME = {stage.name: stage for stage in STAGES}
OF_THE_PIPELINE = ("stages",)  # sections of metrics.json that belong to no single stage


def before(name: str) -> tuple[str, ...]:
    """The stages before one, in order. KeyError for a name that is no stage."""
    return NAMES[: NAMES.index(BY_NAME[name].name)]


def up_to(name: str) -> tuple[str, ...]:
    """The stages up to one, itself included."""
    return (*before(name), name)


def after(name: str) -> tuple[str, ...]:
    """The stages after one, in order."""
    return NAMES[len(up_to(name)) :]


def writer_of(section: str) -> str:
    """The stage that writes a section of metrics.json; "pipeline" where that is no single stage."""
    return next((stage.name for stage in STAGES if section in stage.sections), "pipeline")
