"""What each stage does with a job: a function for each, from the job's run folder to the numbers of its marker.

The modules that do the work are imported when it is done, so that a stage that ends gives its memory back and `dsc --help` is instant.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dsc_hub.config.arms import ADAPTER, models_of
from dsc_hub.config.recipe import generation_at_evaluation
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.weights import evaluation_weights
from dsc_hub.pipeline import pace, preflight, session
from dsc_hub.pipeline.context import Job
from dsc_hub.records import SPLITS, Chain, Prompt
from dsc_hub.report import formatting, sentences
from dsc_hub.runs import run, shards, test_sets
from dsc_hub.runs.cost import cost_of
from dsc_hub.runs.row_index import Stored
from dsc_hub.system import hashing, machine
from dsc_hub.system.progress import say

Result = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"
COST = "prompt_tokens new_tokens seconds tokens_per_s cache_rate processor_hours processors scoring_s retries".split()


def _prompts(job: Job) -> Result:
    found, dropped = load_prompts(job.recipe.prompts, job.path.parent, job.recipe.seed, job.identity["prompts"])
    job.run["prompts.jsonl"].unlink(missing_ok=True)
    rows = job.run.rows("prompts.jsonl")
    for prompt in found:
        rows.append(prompt)
    rows.close()
    counts = {s: sum(p.split == s for p in found) for s in SPLITS}
    groups = {s: len({p.group for p in found if p.split == s}) for s in SPLITS}
    shown = ", ".join(f"{counts[s]} {s}" for s in counts)
    say(
        f"prompts  {len(found)} of {dropped.read} ({shown})  in {sum(groups.values())} groups  dropped: {dropped.duplicates} "
        f"duplicate, {dropped.overlaps} overlapping"
        + (f"  without a group: {dropped.ungrouped}" if dropped.ungrouped else "")
    )
    return counts | {"groups": groups} | dropped.as_metrics()


def _sampling(job: Job) -> Result:
    from dsc_hub.metrics import loading
    from dsc_hub.sampling import sample

    if job.shard is None and shards.are_waiting(job.run):
        raise RunError(
            f"shards of this sampling are in {job.run[shards.FOLDER]}, and nothing was made of them yet",
            "`dsc merge RECIPE`, with the overrides they were sampled with, takes them. To sample without them, move that folder away.",
        )
    started = time.monotonic()
    wanted = wanted_prompts(job)
    reward = loading.load_named("reward", job.recipe, job.run.facts["identity"], job.path.parent)
    veto = session.load_veto(job, job.run.facts["identity"])
    if known := sample.turns_of_others(job.run, run.siblings(job.runs, job.recipe.name)):
        say(f"sampling  {len(known):,} turns of other runs with this model and these settings are at hand")
    c = job.recipe.chain
    new_tokens = len(wanted) * c.chains_per_prompt * (1 + 2 * c.steps) * job.recipe.generation.max_new_tokens
    with session.served(job, new_tokens=new_tokens) as endpoints:
        tally, seconds = session.chains_of(job, endpoints, wanted.values(), reward.score, veto, known)
        session.remember_sampling(job, tally, seconds, time.monotonic() - started)
    return sampled(job, wanted, tally.reused_turns)


def wanted_prompts(job: Job) -> Stored:
    """The prompts to be sampled."""
    mine = job.shard.has if job.shard else bool
    return Stored(job.run.rows("prompts.jsonl"), "train", "validation", keep=mine)


def sampled(job: Job, wanted: Stored, reused_turns: int) -> Result:
    """The numbers of the chains in the run folder, said and returned. ServingError if there is no chain."""
    from dsc_hub.sampling import sample, summary

    c, total = job.recipe.chain, len(wanted) * job.recipe.chain.chains_per_prompt
    chains = sample.read_chains(job.run)
    numbers = summary.summary(chains, lambda i: wanted[i].group, total, c.steps) | _diagnosed(job, chains, wanted)
    numbers |= cost_of(job.run, "sampling", "turns.jsonl") | {"reused_turns": reused_turns}
    steps = "  ".join(f"step {s['step']}: {s['accepted']}/{s['proposals']} accepted" for s in numbers["steps"])
    say(
        f"sampling  {numbers['finished']}/{total} chains  failed {numbers['failed']}  {steps}  unscored {numbers['unscored']} "
        f"-> {job.run['chains.jsonl']}"
    )
    say(f"  {formatting.sampling_cost(numbers)}")
    for what, n in summary.waterfall(numbers):
        say(f"  {n:>8,}  {what}" if n >= 0 else f"  {n:>8,}    {what}".replace("-", "\N{MINUS SIGN}"))
    if numbers["stripped"]:
        say(f"  {numbers['stripped']:>8,}  of these texts lost an opening that talked about the task")
    say(sentences.last_step_sentence({"sampling": numbers}))
    if not numbers["finished"] and total:
        raise ServingError(
            f"not one of {total} chains could be finished", f"The reasons are in {job.run['failed.jsonl']}."
        )
    job.run.add_facts(cost=job.run.facts.get("cost", {}) | {"sampling": {k: numbers[k] for k in COST}})
    return numbers


def _diagnosed(job: Job, chains: Iterable[Chain], prompts: Mapping[str, Prompt]) -> Result:
    """Did the chains settle, and what did the last step give?"""
    from dsc_hub.sampling import convergence

    c = job.recipe.chain
    return {
        "mixing": convergence.mixing(chains, c.acceptance, c.steps, c.chains_per_prompt),
        "last_step": convergence.last_step(chains, lambda i: prompts[i].group, c.steps),
    }


def _dataset(job: Job) -> Result:
    from dsc_hub.data import dataset
    from dsc_hub.sampling import sample

    found = Stored(job.run.rows("prompts.jsonl"), *SPLITS)
    chains = sample.read_chains(job.run)
    if len(chains) != (finished := job.run.marker("sampling")["result"]["finished"]):
        raise RunError(
            f"{job.run['chains.jsonl']} holds {len(chains)} chains, and {finished} were finished",
            f"Remove {job.run['sampling.done.json']} and run again: only what is missing is sampled.",
        )
    if "mixing" not in (sampled := job.run.metrics.get("sampling", {})):  # chains of an earlier version, taken over
        job.run.add_metrics("sampling", sampled | _diagnosed(job, chains, found))
    counts = dataset.build(job.run, job.recipe, found, chains)
    dropped = ", ".join(f"{n} {why}" for why, n in counts["dropped"].items()) or "none"
    say(
        f"dataset  sft {counts['sft'].get('train', 0)} train, {counts['sft'].get('validation', 0)} validation  dropped: {dropped} -> {job.run['dataset']}"
    )
    return counts


def _distill(job: Job) -> Result:
    from dsc_hub.distill import launcher

    result = launcher.launch(job.run)
    return result | {"adapter_sha256": hashing.file_hash(job.run["adapter"] / WEIGHTS)}


def _ask_arms(
    job: Job, held_out: Sequence[Prompt], reward: Any, folder: Path, adapters: Mapping[str, Path] | None, base: str
) -> tuple[dict[str, dict[str, float]], pace.Pace | None]:
    """Have the arms answered, those of the base only if no other run has them whole (`base`: their digest). The nats of
    neutral texts by arm, and how it went, without what the rest of the stage takes; None where that says nothing of the
    machine."""
    from dsc_hub.evaluation import arms
    from dsc_hub.metrics.batching import Scoring

    e, endpoints = job.recipe.evaluation, job.recipe.serving.endpoints
    is_fresh = not job.run["evaluation"].is_dir()
    veto = session.load_veto(job, job.run.facts["identity"])
    if donor := arms.adopt_base(job.run, base, run.siblings(job.runs, job.recipe.name)):
        say(f"evaluation: the base's arms are those of {donor}, whose inputs were the same")
    reused = arms.finished_base(job.run, base)
    neutral = dict(reused or {})
    requests, new_tokens, seconds = 0, 0, 0.0
    for together in preflight.models_by_server(e.arms, endpoints):
        if not (left := [model for model in together if model is not None or reused is None]):
            continue
        with session.served(job, adapters if ADAPTER in left else None, folder=folder) as servers:
            generator = session.generator_of(job, servers, generation_at_evaluation(job.recipe))
            started = time.monotonic()
            work = partial(arms.ask_all, job.run, job.recipe, held_out, generator, Scoring(reward), veto, left)
            neutral |= asyncio.run(session.ask(generator, work))
            requests, new_tokens = requests + generator.requests, new_tokens + generator.new_tokens
            seconds += time.monotonic() - started
    if not is_fresh or reused is not None or endpoints:
        return neutral, None
    return neutral, pace.Pace("evaluation", requests, len(held_out) * e.samples, new_tokens, seconds, 0.0)


def _evaluation(job: Job) -> Result:
    from dsc_hub.evaluation import arms, blind
    from dsc_hub.evaluation.answers import collect, count_adapters, write_answers
    from dsc_hub.evaluation.summary import summarise
    from dsc_hub.metrics import loading

    e, identity, started = job.recipe.evaluation, job.run.facts["identity"], time.monotonic()
    held_out = job.prompts(e.split)
    scorers = loading.load_all(job.recipe, identity, job.path.parent)
    score = {name: scorer.score for name, scorer in scorers.items()}
    served = {ADAPTER: job.run["adapter"]} if ADAPTER in models_of(e.arms) else None
    folder, weights = Path(job.run.facts["model"]["folder"]), "in bfloat16"
    if served:
        folder, weights = evaluation_weights(folder, job.model.identity, job.recipe.distill.model_dump())
    base = arms.base_digest(job.recipe, job.fingerprints["sampling"])
    neutral, measured = _ask_arms(job, held_out, score["reward"], folder, served, base)
    answers = collect(job.run, job.recipe, held_out, score)
    if silent := [arm for arm in e.arms if not any(a["arm"] == arm for a in answers)]:
        raise ServingError(
            f"no answer at all from: {', '.join(silent)}", f"The reasons are in {job.run['log.txt']} and evaluation/."
        )
    arms.finish_base(job.run, base, answers, len(held_out) * e.samples, neutral)
    count, kind = session.processors(job)
    about = {
        name: {"name": s.name, "unit": s.unit, "higher_is_better": True, "low": s.bounds[0], "high": s.bounds[1]}
        for name, s in scorers.items()
    }
    trained = job.run["adapter"] / WEIGHTS if served else None
    looks = count_adapters(job.runs, held_out, trained) if e.split == "test" else {}
    numbers = summarise(
        job.recipe,
        held_out,
        answers,
        about,
        {arm: arms.seconds(job.run, arm) for arm in e.arms},
        neutral,
        count,
        trained_here="adapter" not in job.run.facts,
        look=looks.get("position"),
    )
    numbers["processors"] = kind or ("GPU" if job.run.facts["hardware"]["gpus"] else "core")
    numbers["neutral_texts"], numbers["neutral"] = max(map(len, neutral.values()), default=0), neutral
    numbers["scores"] = about
    numbers["served_on"] = _served_on(job, weights, adapter=served is not None)
    write_answers(job.run, answers, e.split)
    if measured:
        other_s = round(time.monotonic() - started - measured.generating_s, 2)
        pace.remember(job.model.identity, replace(measured, other_s=other_s))
    blind.retell(job.run)  # what people judged may have been other answers
    if looks:
        job.run.add_metrics("test_set", looks)
    else:
        job.run.drop_metrics("test_set")
    say(
        f"evaluation  {len(answers)} answers of {len(e.arms)} arms on {len(held_out)} {e.split} prompts -> {job.run['evaluation']}"
    )
    return numbers


def _served_on(job: Job, weights: str, *, adapter: bool) -> str:
    """In words, the weights that all arms ran on and how they were computed with."""
    if job.recipe.serving.endpoints:
        return f"{job.model.id} as {', '.join(job.recipe.serving.endpoints)} serves it"
    parts = [f"{job.model.id} {weights}"]
    if adapter:
        parts.append("adapter unmerged")
    if machine.vllm_on_cpu() and machine.cpu_dtype() == "float32":
        parts.append("computed in float32")
    return ", ".join(parts)


def _report(job: Job) -> Result:
    from dsc_hub.report import page

    metrics = test_sets.with_current_looks(job.run, job.run.metrics)
    if "test_set" in metrics:  # others may have been scored on it since
        job.run.add_metrics("test_set", metrics["test_set"])
    result = page.build(job.run)
    say(f"report  {result['plots']} plots -> {job.run['report.html']}")
    return result


def _cards(job: Job) -> Result:
    from dsc_hub.report import cards

    return {"files": cards.build(job.run)}


def publish(job: Job, account: Any) -> Result:
    from dsc_hub.publish import upload
    from dsc_hub.report import cards

    trained = job.run.marker("distill")["result"]["adapter_sha256"]
    if hashing.file_hash(job.run["adapter"] / WEIGHTS) != trained:
        raise RunError(
            f"{job.run['adapter'] / WEIGHTS} is not what was trained and evaluated: its hash has changed",
            f"Remove {job.run['distill.done.json']} and run again.",
        )
    job.run.add_facts(repos=job.run.facts["repos"] | {"endpoint": account.endpoint})
    return upload.publish(
        job.run,
        account,
        Path(job.run.facts["model"]["folder"]),
        job.path.parent,
        job.recipe.publish,
        lambda: cards.build(job.run),
        job.names_by,
    )


STAGE: dict[str, Callable[[Job], Result]] = {
    "prompts": _prompts,
    "sampling": _sampling,
    "dataset": _dataset,
    "distill": _distill,
    "evaluation": _evaluation,
    "report": _report,
    "cards": _cards,
}
