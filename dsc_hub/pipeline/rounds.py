"""Rounds: the distilled model answers, criticises and revises in the next round, and a new adapter is trained on that.

Each round is a run folder of its own below the run, `rounds/<number>`, with its chains, dataset and adapter:

    round 1: the base samples             -> dataset -> adapter 1
    round k: base + adapter k-1 samples   -> dataset -> adapter k, trained on the base from the rows of this round

The rounds end early when the mean reward of answers to validation prompts, which each training measures in the end,
does not rise. The run itself gets the chains, dataset and adapter of the best round, so that everything after it knows
nothing of rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.stages import BY_NAME
from dsc_hub.errors import RunError
from dsc_hub.inference.adapters import WEIGHTS
from dsc_hub.pipeline.context import RunContext, record
from dsc_hub.report.formatting import number
from dsc_hub.report.sentences import rounds_sentence
from dsc_hub.runs import run as runs
from dsc_hub.runs.metrics_schema import Metrics, Round, Rounds
from dsc_hub.runs.reuse import copy_files, find_adoptable, reusable_stages
from dsc_hub.runs.run import Run
from dsc_hub.system import progress
from dsc_hub.system.hashing import digest, file_hash
from dsc_hub.system.progress import say

STAGES = ("prompts", "sampling", "dataset", "distill")  # of each round
VALIDATION_PROMPTS = 64  # answered after each training, unless `distill.validation_prompts` says otherwise
SECTION = "rounds"  # in metrics.json

RunStage = Callable[[RunContext, str], None]


def run_rounds(context: RunContext, run_stage: RunStage) -> Rounds:
    """Run the rounds, record them in metrics.json and copy the chains of the best one into the run folder.

    Finished stages of a round are not repeated. RunError if a training measured no validation reward.
    """
    done: list[Round] = []
    previous: Run | None = None
    for k in range(1, context.recipe.rounds + 1):
        here = _round_context(context, k, previous)
        say(f"round {k}/{context.recipe.rounds}  -> {here.run.folder}")
        _remove_outdated(here)
        record(here)
        facts = context.run.raw_facts
        here.run.add_facts(repos=facts["repos"], model=facts["model"])
        for stage in STAGES:
            run_stage(here, stage)
        done.append(_numbers(here.run, k))
        say(f"round {k}/{context.recipe.rounds}  validation reward {number(done[-1].validation_reward, 3)}")
        if k > 1 and done[-1].validation_reward <= done[-2].validation_reward:
            break
        previous = here.run
    best = max(done, key=lambda r: r.validation_reward)  # of equal ones the first
    rounds = Rounds(planned=context.recipe.rounds, kept=best.round, rounds=done)
    progress.log_to(context.run["log.txt"])
    say(f"rounds  {rounds_sentence(rounds)}")
    context.run.add_metrics(SECTION, rounds.model_dump())
    copy_files(context.run, round_run(context.run, best.round), BY_NAME["sampling"].files)
    return rounds


def seconds_of_starts(run: Run, done: Rounds) -> float | None:
    """Return how long these rounds waited for vLLM's starts; None if they started none."""
    starts = [round_run(run, r.round).metrics.get("server_starts", {}) for r in done.rounds]
    return sum(sum(s.values()) for s in starts) if any(starts) else None


def chains_left(context: RunContext, chains: int) -> list[int]:
    """Return how many of a round's `chains` are left to sample, for each round that has some left.

    A recipe without rounds has one. Finished rounds, and those that other runs have, count as done; a round after a
    training that is still to be done is counted in full, as only its validation tells whether it is needed.
    """
    total = context.recipe.rounds
    if total == 1:
        finished = reusable_stages(context.run, STAGES[:2], context.fingerprints, all_siblings(context))
        left = 0 if "sampling" in finished else _chains_left(context, chains)
        return [left] if left else []
    previous: Run | None = None
    rewards: list[float] = []
    for k in range(1, total + 1):
        here = _round_context(context, k, previous)
        finished = reusable_stages(here.run, STAGES, here.fingerprints, all_siblings(context))
        if "sampling" not in finished:
            left = _chains_left(here, chains)
            return [left] * bool(left) + [chains] * (total - k)
        if "distill" not in finished:
            return [chains] * (total - k)
        previous = finished["distill"]
        distill = Metrics.model_validate(previous.metrics).distill
        if distill is None or distill.validation_reward is None:
            return []  # the rounds can't go on: `run_rounds` says so
        rewards.append(distill.validation_reward)
        if k > 1 and rewards[-1] <= rewards[-2]:
            return []
    return []


def _chains_left(here: RunContext, chains: int) -> int:
    """Return how many chains an unfinished sampling has left, in its own folder or in one whose rows it adopts."""
    fingerprint = here.fingerprints["sampling"]
    recorded = here.run.raw_facts if here.run["run.json"].is_file() else {}
    if recorded.get("fingerprints", {}).get("sampling") == fingerprint and here.run["turns.jsonl"].is_file():
        source: Run | None = here.run
    else:
        source = find_adoptable(here.run, "sampling", fingerprint, all_siblings(here))
    if source is None or not source["chains.jsonl"].is_file():
        return chains
    with source["chains.jsonl"].open("rb") as file:
        return max(0, chains - sum(line.endswith(b"\n") for line in file))


def round_run(run: Run, number: int) -> Run:
    """Return the run folder of a round."""
    return Run(run[f"rounds/{number}"])


def copy_adapter(run: Run) -> dict[str, Any]:
    """Copy the adapter of the round that was kept into the run folder; return what its training recorded."""
    source = round_run(run, Rounds.model_validate(run.metrics[SECTION]).kept)
    result = source.result("distill")
    shutil.rmtree(run["adapter"], ignore_errors=True)
    shutil.copytree(source["adapter"], part := run["adapter.part"], dirs_exist_ok=True)
    part.rename(run["adapter"])
    if file_hash(run["adapter"] / WEIGHTS) != result["adapter_sha256"]:
        raise RunError(
            f"{source['adapter'] / WEIGHTS} is not what was trained in that round: its hash has changed",
            f"Remove {source['distill.done.json']} and {run['sampling.done.json']} and run again.",
        )
    return result


def _round_context(context: RunContext, number: int, previous: Run | None) -> RunContext:
    """Return the context of one round; its sampling depends on the adapter of the previous one."""
    distill = context.recipe.distill
    measured = distill.model_copy(update={"validation_prompts": distill.validation_prompts or VALIDATION_PROMPTS})
    recipe = context.recipe.model_copy(update={"rounds": 1, "distill": measured})
    fingerprints = stage_fingerprints(recipe, context.identity)
    adapter = None
    if previous is not None:
        adapter = previous["adapter"]
        before = previous.result("distill")["adapter_sha256"]
        for stage in STAGES[1:]:
            fingerprints[stage] = before = digest(before, fingerprints[stage])
    return replace(
        context,
        recipe=recipe,
        run=round_run(context.run, number),
        fingerprints=fingerprints,
        adapter=adapter,
    )


def _remove_outdated(here: RunContext) -> None:
    """Remove a round that another adapter sampled: its rows would pass for finished chains of this one."""
    if here.run["run.json"].is_file():
        before = here.run.raw_facts.get("fingerprints", {}).get("sampling")
        if before != here.fingerprints["sampling"]:
            say(f"round  the adapter before it is another one by now: {here.run.folder} is sampled anew")
            shutil.rmtree(here.run.folder)


def _numbers(run: Run, number: int) -> Round:
    metrics = Metrics.model_validate(run.metrics)
    assert metrics.sampling and metrics.dataset and metrics.distill, "the stages of the round are done"
    if metrics.distill.validation_reward is None:
        raise RunError(
            f"no answer to a validation prompt of round {number} was scored, so the rounds can't be compared",
            "Look at answers and their rewards with `dsc try`, or set rounds: 1.",
        )
    return Round(
        round=number,
        first_reward=metrics.sampling.first_reward,
        final_reward=metrics.sampling.steps[-1].reward_state,
        rows=metrics.dataset.sft.get("train", 0),
        validation_reward=metrics.distill.validation_reward,
        seconds=sum(metrics.stages.get(stage, 0.0) for stage in STAGES),
    )


def all_siblings(context: RunContext) -> list[Run]:
    """Return the other runs of the recipe and their rounds, newest first: what a stage may be taken over from."""
    others = runs.siblings(context.runs, context.recipe.name)
    return [run for other in others for run in (other, *_rounds_of(other))]


def sampled_by_the_base(context: RunContext) -> list[Run]:
    """Return the other runs of the recipe whose turns the base generated: of a run with rounds that is the first one.

    Such a run's own rows are those of the round that it kept, and so perhaps an adapter's.
    """
    others = runs.siblings(context.runs, context.recipe.name)
    first = [round_run(run, 1) if run["rounds"].is_dir() else run for run in others]
    return [run for run in first if run["run.json"].is_file()]


def _rounds_of(run: Run) -> list[Run]:
    return [Run(folder) for folder in sorted(run["rounds"].glob("*")) if (folder / "run.json").is_file()]
