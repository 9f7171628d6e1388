"""The stages of a run, in order: one table. A new stage is one entry here and one function in `pipeline/stages.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsc_hub.config.arms import ADAPTER, model_files


@dataclass(frozen=True)
class Inputs:
    """Inputs of the fingerprints: the recipe, and the identities of what it names.

    `recipe` omits default values, so that a newer dsc with an additional setting continues the runs of an older one.
    `identity` maps `prompts`, `model`, `student` (if there is one) and each scorer's place to a hash, commit or
    version; "" for a scorer that the recipe does not have. `more_scorers` are the identities of further terms of the
    reward and of the veto's similarity scorer.
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
    """One stage, with everything that the rest of dsc_hub needs to know about it."""

    name: str
    command: str  # runs it: `dsc COMMAND RECIPE`
    version: int  # increase when a default of its settings or its behaviour changes: older runs then repeat it
    inputs: Callable[[Inputs], list[Any]]  # its own inputs to the fingerprint, in addition to those of earlier stages
    files: tuple[str, ...] = ()  # its outputs; not done if the first one is missing. Empty: never reused
    sealed: tuple[str, ...] = ()  # those of its outputs that are final once it is done: its marker has their hashes
    sections: tuple[str, ...] = ()  # sections of metrics.json; the first one is its result
    stale_files: tuple[str, ...] = ()  # outputs of later stages that become invalid when it runs again
    shows_judgements: bool = False  # depends on human verdicts: repeated after `dsc blind`
    is_timed: bool = True  # whether its duration is recorded in metrics.json


def _chain_inputs(i: Inputs) -> dict[str, Any]:
    section = i.section("chain")
    if critic := section.get("critic"):
        section["critic"] = {k: v for k, v in critic.items() if k != "price"}
        # `generation.extra` was once sent to critics too: such critiques are not those of today.
        if (i.recipe.get("generation") or {}).get("extra"):
            section["critic"]["extra"] = critic.get("extra") or {}
    return section


def _sampling_inputs(i: Inputs) -> list[Any]:
    # Context is included: it decides which prompts fit. Endpoints are included: another server may serve another model.
    # Settings that affect only the speed (concurrency, memory, a scorer's batch size) are excluded.
    serving = {k: v for k, v in i.section("serving").items() if k in ("context", "endpoints", "served_model")}
    texts = (_chain_inputs(i), i.section("hygiene"), i.section("generation"))
    # In rounds, chains depend on the adapters of the rounds before, and so on what these were trained on and how.
    rounds = i.recipe.get("rounds", 1)
    temperature = i.section("evaluation").get("temperature")  # of the answers by which rounds are compared
    trained = [["rounds", rounds, i.section("dataset"), *_distill_inputs(i), temperature]] if rounds > 1 else []
    return [
        i.identity["model"],
        *texts,
        serving,
        i.section("reward", "batch_size"),
        i.identity["reward"],
        *i.more_scorers,
        *trained,
        *_ends_inputs(i),
    ]


def _ends_inputs(i: Inputs) -> list[Any]:
    # Where sampling ends when there are enough rows, it depends on what makes a row.
    if "rows" in i.section("dataset") or i.section("budget"):
        return [["ends", i.section("dataset"), i.section("budget")]]
    return []


def _distill_inputs(i: Inputs) -> list[Any]:
    # The number of processes is included: it multiplies the batch size. How they are started and tracked is
    # not, nor are the settings of other objectives.
    section = i.section("distill", "launch", "report_to")
    used = section.get("objective", "sft")
    settings = {k: v for k, v in section.items() if k not in ("sft", "dpo", "kto") or k == used}
    # What is answered while training is answered at this temperature, and may choose the adapter.
    answered = [i.section("evaluation").get("temperature")] if "validation_prompts" in section else []
    # Until 2026-11-29 steps after a validation were wrong on some CPUs: such trainings are done again.
    objective = settings.get(used) or {}
    validates = objective.get("eval_strategy", "no") != "no" or {"validation_prompts", "patience"} & section.keys()
    mended = ["steps after a validation"] if validates or objective.get("load_best_model_at_end") else []
    if "chat_template_kwargs" in (i.section("generation").get("extra") or {}):  # rows were rendered without them
        mended.append("template settings")
    student = [["student", i.identity["student"]]] if "student" in i.recipe else []
    return [settings, *answered, *mended, *student]


def _evaluation_inputs(i: Inputs) -> list[Any]:
    scorers = ("second_scorer", "third_scorer")
    return [i.section("evaluation"), *(part for s in scorers for part in (i.section(s, "batch_size"), i.identity[s]))]


STAGES = (
    Stage(
        "prompts",
        command="sample",
        version=3,
        inputs=lambda i: [i.section("prompts"), i.identity["prompts"], i.seed],
        files=("prompts.jsonl",),
        sealed=("prompts.jsonl",),
        sections=("prompts",),
    ),
    Stage(
        "sampling",
        command="sample",
        version=5,
        inputs=_sampling_inputs,
        files=("chains.jsonl", "turns.jsonl", "failed.jsonl", "sessions.jsonl"),
        sealed=("chains.jsonl", "turns.jsonl"),
        sections=("sampling", "rounds"),
    ),
    Stage(
        "dataset",
        command="dataset",
        version=4,
        inputs=lambda i: [i.section("dataset")],
        files=("dataset/sft", "dataset/preference", "dataset/repairs", "dataset/chains"),
        sealed=("dataset/sft", "dataset/preference", "dataset/repairs", "dataset/chains"),
        sections=("dataset",),
    ),
    Stage(
        "distill",
        command="distill",
        version=2,
        inputs=_distill_inputs,
        files=("adapter",),
        sealed=("adapter",),
        sections=("distill",),
        stale_files=model_files(ADAPTER),
    ),
    Stage(
        "evaluation",
        command="evaluate",
        version=8,
        inputs=_evaluation_inputs,
        files=("evaluation", "dataset/evaluation"),
        sealed=("evaluation", "dataset/evaluation"),
        sections=("evaluation", "test_set", "blind"),
    ),
    Stage(
        "report",
        command="report",
        version=3,
        inputs=lambda i: [i.name, i.description],
        files=("report.html", "report"),
        shows_judgements=True,
    ),
    Stage(
        "cards",
        command="report",
        version=3,
        inputs=lambda i: [i.section(s) for s in ("publish", "model", "student") if s != "student" or s in i.recipe],
        files=("cards",),
        shows_judgements=True,
    ),
    Stage(
        "publish",
        command="publish",
        version=1,
        inputs=lambda i: [],
        shows_judgements=True,
        is_timed=False,  # metrics.json is published itself: publishing must not change it
    ),
)
NAMES = tuple(stage.name for stage in STAGES)
BY_NAME = {stage.name: stage for stage in STAGES}


def before(name: str) -> tuple[str, ...]:
    """Return the stages before `name`, in order. KeyError for an unknown name."""
    return NAMES[: NAMES.index(BY_NAME[name].name)]


def up_to(name: str) -> tuple[str, ...]:
    """Return the stages up to and including `name`."""
    return (*before(name), name)


def after(name: str) -> tuple[str, ...]:
    """Return the stages after `name`, in order."""
    return NAMES[len(up_to(name)) :]


def writer_of(section: str) -> str:
    """Return the stage that writes a section of metrics.json; "pipeline" if that is no single stage."""
    return next((stage.name for stage in STAGES if section in stage.sections), "pipeline")
