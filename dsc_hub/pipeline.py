"""The stages in order, each skipped when its marker matches: what `dsc run` is.

    prompts -> sampling -> dataset -> distill -> evaluation -> report -> cards -> publish

A stage gets a `Job`: the checked recipe and its run folder. Stages are imported when they run, so that one that ends gives
its memory back and `dsc --help` is instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc_hub import adapters, machine, models, prompts, runs, shards, wording
from dsc_hub.chain import VetoText, no_veto
from dsc_hub.errors import ConfigError, RunError, ServingError
from dsc_hub.index import Index, Stored
from dsc_hub.jobs import Job, check, hub_account, record, set_owner
from dsc_hub.progress import duration, say
from dsc_hub.recipe import ADAPTER, STAGES, Generation, digest, generation_at_evaluation, models_of, repo_names
from dsc_hub.recipe import veto as veto_of
from dsc_hub.records import SPLITS, Chain, Prompt
from dsc_hub.runs import Run

Result = dict[str, Any]
WEIGHTS = "adapter_model.safetensors"
COST = "prompt_tokens new_tokens seconds tokens_per_s cache_rate processor_hours processors scoring_s retries".split()
WORTH_REMEMBERING = 1000  # new tokens; a speed measured on fewer says little


# -- running


def run_all(job: Job, last: str = "publish", retry_failed: bool = False) -> None:
    """Run the stages up to `last`, skipping what is done. The folder is held for as long as it takes."""
    _one_process()
    with job.run.lock(), contextlib.ExitStack() as stack:
        record(job)
        account = stack.enter_context(hub_account(job.recipe)) if last == "publish" else None
        check(job, account, last)
        set_owner(job, account)
        for stage in STAGES[: STAGES.index(last) + 1]:
            run_stage(job, stage, account, retry_failed)


def run_one(job: Job, stage: str) -> None:
    """Run one stage alone, skipped if it is done. RunError if one before it isn't done."""
    _one_process()
    is_new = not job.run["run.json"].exists()
    with job.run.lock(), contextlib.ExitStack() as stack:
        record(job)
        for earlier in STAGES[: STAGES.index(stage)]:
            if not job.run.is_done(earlier, job.fingerprints[earlier]) and not _take_over(job, earlier):
                if is_new:  # nothing was done here, only taken over: a folder that is left would look like a run
                    shutil.rmtree(job.run.folder)
                verbs = {"prompts": "sample", "sampling": "sample", "evaluation": "evaluate", "cards": "report"}
                raise RunError(
                    f"the stage '{earlier}' of {job.run.folder} is not done",
                    f"Run `dsc {verbs.get(earlier, earlier)}` first, or `dsc run` for all of it.",
                )
        account = None
        if stage == "publish":
            account = stack.enter_context(hub_account(job.recipe))
            check(job, account, stage)
        if account or "folder" not in job.run.facts["model"]:
            set_owner(job, account)
        run_stage(job, stage, account)


def evaluate_adapter(job: Job, reference: str) -> Job:
    """Score an adapter of the Hub on a recipe's test prompts, beside the recipe's base model; the job with its run folder,
    `runs/<recipe>+<adapter>/<fingerprint>`.

    ConfigError if `reference` is no hub:USER/REPO, or if the adapter was trained on another base.
    """
    from dsc_hub import hub

    _one_process()
    if not reference.startswith("hub:"):
        raise ConfigError(f"--adapter {reference}: expected hub:USER/REPO[@REVISION]")
    if job.recipe.serving.endpoints:
        raise ConfigError(
            "serving.endpoints: servers that already run don't have the adapter", "Leave serving.endpoints empty."
        )
    if "distilled" not in job.recipe.evaluation.arms:
        raise ConfigError(f"evaluation.arms: {', '.join(job.recipe.evaluation.arms)} has no 'distilled' to score")
    repo = reference.removeprefix("hub:")
    folder, commit = hub.pull_adapter(repo)
    name = repo.partition("@")[0]
    adapters.check(reference, folder, job.model, repo_names(job.recipe)["base"])
    distill = adapters.trained_how(reference, folder)
    place = job.runs / f"{job.recipe.name}+{name.replace('/', '--')}" / digest(job.fingerprints["evaluation"], commit)
    job = replace(job, recipe=job.recipe.model_copy(update={"distill": distill}), run=Run(place))
    with job.run.lock():
        record(job)
        set_owner(job, None)
        job.run.add_facts(adapter={"repo": name, "commit": commit})
        run_stage(job, "prompts")
        shutil.rmtree(job.run["adapter"], ignore_errors=True)
        job.run["adapter"].mkdir()
        for file in adapters.FILES:  # the cache may hold more of that repo than was asked for
            shutil.copy2(folder / file, job.run["adapter"] / file)
        run_stage(job, "evaluation")
    return job


def _one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"started with {os.environ['WORLD_SIZE']} processes, but a run has one",
            "Start one (--num_processes 1) and set distill.processes: training starts its own.",
        )


def _take_over(job: Job, stage: str) -> bool:
    """Take a finished stage over from another run with the same inputs, if there is one."""
    before = STAGES[: STAGES.index(stage)]
    donor = job.run.take_over(stage, job.fingerprints[stage], before, runs.siblings(job.runs, job.recipe.name))
    if donor is None:
        return False
    _forget_after(job, stage)
    _note_time(job, stage, job.run.marker(stage)["seconds"])
    say(f"{stage}: taken over from {donor.name}, whose inputs were the same")
    return True


def _forget_after(job: Job, stage: str) -> None:
    """What follows was made from what has changed or is about to."""
    for later in STAGES[STAGES.index(stage) + 1 :]:
        job.run.unfinish(later)
    if stage == "distill":
        for name in ("turns", "chains", "failed", "seconds"):
            job.run[f"evaluation/distilled.{name}.jsonl"].unlink(missing_ok=True)


def _note_time(job: Job, stage: str, seconds: float) -> None:
    if stage != "publish":  # metrics.json is published itself: it must not change by being published
        job.run.add_metrics("stages", job.run.metrics.get("stages", {}) | {stage: round(seconds, 1)})


def run_stage(job: Job, stage: str, account: Any = None, retry_failed: bool = False) -> None:
    """One stage: skipped if its marker matches, taken over from another run that did the same, or done now."""
    if stage == "publish":
        if account is None:
            say("publish: skipped, publish.to is none")
            return
    elif job.run.is_done(stage, job.fingerprints[stage]) and not (retry_failed and _has_failures(job, stage)):
        say(f"{stage}: done before")
        return
    elif not retry_failed and _take_over(job, stage):
        return
    job.run.unfinish(stage)
    _forget_after(job, stage)
    if stage == "sampling" and (
        donor := job.run.adopt_rows(stage, job.fingerprints[stage], runs.siblings(job.runs, job.recipe.name))
    ):
        say(f"{stage}: going on from what {donor.name} had done of it")
    started = time.monotonic()
    result = _publish(job, account) if stage == "publish" else STAGE[stage](job)
    seconds = time.monotonic() - started
    if stage in ("prompts", "sampling", "dataset", "distill", "evaluation"):
        job.run.add_metrics(stage, result)
    _note_time(job, stage, seconds)
    job.run.finish(stage, job.fingerprints[stage], seconds, {"result": result})


def _has_failures(job: Job, stage: str) -> bool:
    """Did the finished stage leave something undone that `--retry-failed` can take up?"""
    result = job.run.marker(stage)["result"]
    if stage == "evaluation":
        return any(arm["reward"]["failed"] for arm in result["arms"].values())
    return stage == "sampling" and result["failed"] > 0


def _prompts(job: Job) -> Result:
    found, dropped = prompts.load(job.recipe.prompts, job.path.parent, job.recipe.seed, job.identity["prompts"])
    job.run["prompts.jsonl"].unlink(missing_ok=True)
    rows = job.run.rows("prompts.jsonl")
    for prompt in found:
        rows.append(prompt)
    rows.close()
    counts = {s: sum(p.split == s for p in found) for s in SPLITS}
    groups = {s: len({p.group for p in found if p.split == s}) for s in SPLITS}
    shown = ", ".join(f"{counts[s]} {s}" for s in counts)
    say(
        f"prompts  {len(found)} of {dropped['read']} ({shown})  in {sum(groups.values())} groups  dropped: {dropped['duplicates_dropped']} "
        f"duplicate, {dropped['overlapping_dropped']} overlapping"
    )
    return counts | {"groups": groups} | dropped


@contextlib.contextmanager
def _served(
    job: Job,
    adapters: Mapping[str, Path] | None = None,
    log: Path | None = None,
    folder: Path | None = None,
    new_tokens: int = 0,
) -> Iterator[list[Any]]:
    """Endpoints to ask: those the recipe names, or vLLMs of our own on `folder` (default: the base model's) that write to
    `log` (default: vllm.log). `new_tokens`: how many are expected of them, which says whether compiling pays."""
    from dsc_hub import serving

    section = job.recipe.serving
    if section.endpoints:
        yield serving.external(section)
        return
    folder = folder or Path(job.run.facts["model"]["folder"])
    places = serving.replica_places(section)
    compiled = serving.worth_compiling(new_tokens, machine.known_speed(job.model.identity))
    started = time.monotonic()
    with serving.serve(
        folder, section, log or job.run["vllm.log"], adapters, places=places, compiled=compiled
    ) as endpoints:
        many = f" in {len(places)} replicas" if len(places) > 1 else ""
        say(
            f"vLLM serves {job.model.id}{' and the adapter' if adapters else ''}{many}, ready after {duration(time.monotonic() - started)}"
        )
        yield endpoints


def _sampling(job: Job) -> Result:
    from dsc_hub import metrics, sampling

    if job.shard is None and shards.are_waiting(job.run):
        raise RunError(
            f"shards of this sampling are in {job.run[shards.FOLDER]}, and nothing was made of them yet",
            "`dsc merge RECIPE`, with the overrides they were sampled with, takes them. To sample without them, move that folder away.",
        )
    wanted = _wanted(job)
    reward = metrics.load_named("reward", job.recipe, job.run.facts["identity"], job.path.parent)
    veto = _veto(job, job.run.facts["identity"])
    job.run["failed.jsonl"].unlink(missing_ok=True)  # what failed before is tried again now
    if known := sampling.turns_of_others(job.run, runs.siblings(job.runs, job.recipe.name)):
        say(f"sampling  {len(known):,} turns of other runs with this model and these settings are at hand")
    c = job.recipe.chain
    new_tokens = len(wanted) * c.chains_per_prompt * (1 + 2 * c.steps) * job.recipe.generation.max_new_tokens
    with _served(job, new_tokens=new_tokens) as endpoints:
        tally, _ = _chains(job, endpoints, wanted.values(), reward.score, veto, known)
    return _sampled(job, wanted, tally.reused_turns)


def _wanted(job: Job) -> Stored:
    """The prompts to be sampled."""
    mine = job.shard.has if job.shard else bool
    return Stored(job.run.rows("prompts.jsonl"), "train", "validation", keep=mine)


def _sampled(job: Job, wanted: Stored, reused_turns: int) -> Result:
    """The numbers of the chains in the run folder, said and returned. ServingError if there is no chain."""
    from dsc_hub import sampling

    c, total = job.recipe.chain, len(wanted) * job.recipe.chain.chains_per_prompt
    chains = sampling.read_chains(job.run)
    numbers = sampling.summary(chains, lambda i: wanted[i].group, total, c.steps) | _diagnosed(job, chains, wanted)
    numbers |= job.run.cost("sampling", "turns.jsonl") | {"reused_turns": reused_turns}
    steps = "  ".join(f"step {s['step']}: {s['accepted']}/{s['proposals']} accepted" for s in numbers["steps"])
    say(
        f"sampling  {numbers['finished']}/{total} chains  failed {numbers['failed']}  {steps}  unscored {numbers['unscored']} "
        f"-> {job.run['chains.jsonl']}"
    )
    say(f"  {wording.sampling_cost(numbers)}")
    for what, n in sampling.waterfall(numbers):
        say(f"  {n:>8,}  {what}" if n >= 0 else f"  {n:>8,}    {what}".replace("-", "\N{MINUS SIGN}"))
    if numbers["stripped"]:
        say(f"  {numbers['stripped']:>8,}  of these texts lost an opening that talked about the task")
    say(numbers["last_step"]["sentence"])
    if not numbers["finished"] and total:
        raise ServingError(
            f"not one of {total} chains could be finished", f"The reasons are in {job.run['failed.jsonl']}."
        )
    job.run.add_facts(cost=job.run.facts.get("cost", {}) | {"sampling": {k: numbers[k] for k in COST}})
    return numbers


def merge(job: Job, folders: Sequence[Path]) -> None:
    """Make the finished shards of a sampling (`dsc sample --shard`) the run's own; `folders`: none means those in the run folder."""
    with job.run.lock():
        again = job.command.replace("dsc run", "dsc sample", 1)
        found = shards.find(job.run, folders, job.fingerprints["sampling"], again)
        record(job)
        set_owner(job, None)
        run_stage(job, "prompts")
        started = time.monotonic()
        shards.join(job.run, found)
        _forget_after(job, "sampling")
        reused = sum(of.marker("sampling")["result"]["reused_turns"] for of in found)
        result = _sampled(job, _wanted(job), reused)
        if (there := result["finished"] + sum(1 for _ in job.run.rows("failed.jsonl"))) != result["chains"]:
            raise RunError(
                f"of {result['chains']} chains {there} are in the shards",
                "Remove the shards' sampling.done.json and sample them again.",
            )
        job.run.add_metrics("sampling", result)
        seconds = result["seconds"] or time.monotonic() - started
        _note_time(job, "sampling", seconds)
        job.run.finish("sampling", job.fingerprints["sampling"], seconds, {"result": result})
        say(f"merged {len(found)} shards -> {job.run.folder}")


def _diagnosed(job: Job, chains: Iterable[Chain], prompts: Mapping[str, Prompt]) -> Result:
    """Did the chains settle, and what did the last step give?"""
    from dsc_hub import diagnostics

    c = job.recipe.chain
    return {
        "mixing": diagnostics.mixing(chains, c.acceptance, c.steps, c.chains_per_prompt),
        "last_step": diagnostics.last_step(chains, lambda i: prompts[i].group, c.steps),
    }


def _veto(job: Job, identity: Mapping[str, str]) -> VetoText:
    """What blocks acceptance; without a veto no revision makes the way through the scorers' thread."""
    from dsc_hub import metrics
    from dsc_hub.scoring import Scoring

    return Scoring(metrics.load_veto(job.recipe, identity)) if veto_of(job.recipe) else no_veto


def _chains(
    job: Job, endpoints: list[Any], some: Iterable[Prompt], score: Any, veto: VetoText, known: Index | None = None
) -> tuple[Any, float]:
    """Sample the prompts' chains into the run folder; the tally and the seconds. Notes what the session cost, and remembers the
    machine's speed. KeyboardInterrupt after Ctrl-C, with what is finished on disk."""
    from dsc_hub import sampling, serving
    from dsc_hub.scoring import Scoring

    generator, scoring, before = _generator(job, endpoints), Scoring(score), serving.prefix_cache(endpoints)
    started = time.monotonic()
    try:
        tally = asyncio.run(
            _ask(
                generator,
                lambda: sampling.run_with_line(
                    job.run,
                    job.recipe,
                    some,
                    generator.complete,
                    scoring,
                    veto=veto,
                    criticise=generator.criticise,
                    known=known,
                    level=generator.level,
                ),
            )
        )
    finally:  # a session that fails has cost something too
        cached, looked_up = (now - then for now, then in zip(serving.prefix_cache(endpoints), before, strict=True))
        seconds = round(time.monotonic() - started, 2)
        session = {
            "seconds": seconds,
            "new_tokens": generator.new_tokens,
            "cached_tokens": max(0, cached),
            "looked_up_tokens": max(0, looked_up),
            "retries": generator.retries,
            "scoring_s": round(scoring.seconds, 2),
            "processors": _processors(job),
            "kind": _kind(job),
        }
        job.run.note_session("sampling", session)
    if tally.interrupted:
        raise KeyboardInterrupt
    if tally.new_tokens > WORTH_REMEMBERING and not job.recipe.serving.endpoints:
        machine.remember_speed(job.model.identity, tally.new_tokens / seconds)
    return tally, seconds


def _processors(job: Job) -> int | None:
    """Cores or GPUs that the servers have; None where they are somebody else's."""
    from dsc_hub import serving

    section = job.recipe.serving
    if section.endpoints:
        return None
    if machine.vllm_on_cpu():
        return machine.cores()
    return len(serving.replica_places(section)) * section.tensor_parallel


def _kind(job: Job) -> str | None:
    if job.recipe.serving.endpoints:
        return None
    return "core" if machine.vllm_on_cpu() else "GPU"


def _generator(job: Job, endpoints: list[Any], settings: Generation | None = None) -> Any:
    """A generator over the endpoints (`settings`: other than the recipe's generation)."""
    from dsc_hub import serving
    from dsc_hub.generation import Generator

    section, critic = job.recipe.serving, serving.external_critic(job.recipe.chain.critic)
    settings = settings or job.recipe.generation
    return Generator(endpoints, settings, section.request_timeout_s, critic, section.concurrency)


async def _ask(generator: Any, work: Callable[[], Any]) -> Any:
    async with generator:
        return await work()


def try_out(job: Job, count: int) -> tuple[list[tuple[Prompt, Chain]], float, int]:
    """Chains of the first `count` training prompts, in a folder that goes away: (prompt, chain) pairs, seconds, failed."""
    from dsc_hub import metrics, sampling

    found, _ = prompts.load(job.recipe.prompts, job.path.parent, job.recipe.seed, job.identity["prompts"])
    some = [p for p in found if p.split == "train"][:count]
    one_each = job.recipe.model_copy(update={"chain": job.recipe.chain.model_copy(update={"chains_per_prompt": 1})})
    with tempfile.TemporaryDirectory(prefix="dsc-try-") as folder:
        tried = replace(job, recipe=one_each, run=Run(Path(folder)))
        tried.run.add_facts(model={"folder": str(models.materialize(job.model))})
        reward = metrics.load_named("reward", job.recipe, job.identity, job.path.parent)
        veto = _veto(job, job.identity)
        with _served(tried, log=machine.cache_home() / "try.vllm.log") as endpoints:
            tally, seconds = _chains(tried, endpoints, some, reward.score, veto)
        by_id = {p.id: p for p in some}
        if failed := list(tried.run.rows("failed.jsonl")):
            say(f"{len(failed)} failed, the first: {failed[0]['reason']}")
        return [(by_id[c.prompt_id], c) for c in sampling.read_chains(tried.run)], seconds, tally.failed


def _dataset(job: Job) -> Result:
    from dsc_hub import dataset, sampling

    found = Stored(job.run.rows("prompts.jsonl"), *SPLITS)
    chains = sampling.read_chains(job.run)
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
    from dsc_hub import launcher

    result = launcher.launch(job.run)
    return result | {"adapter_sha256": machine.file_hash(job.run["adapter"] / WEIGHTS)}


def _servers(names: Sequence[str], endpoints: Sequence[str]) -> list[tuple[str | None, ...]]:
    """Which models are asked of one server: base and adapter, or the base of one that knows no adapter first. On a CPU
    serving an adapter makes requests to its base half as slow again, which costs more than another start."""
    models = models_of(names)
    if len(models) < 2 or endpoints or not machine.vllm_on_cpu():
        return [models]
    return [(model,) for model in models]


def _evaluation(job: Job) -> Result:
    from dsc_hub import arms, blind, evaluation, metrics
    from dsc_hub.scoring import Scoring

    e, identity = job.recipe.evaluation, job.run.facts["identity"]
    held_out = job.prompts(e.split)
    scorers = metrics.load_all(job.recipe, identity, job.path.parent)
    score = {name: scorer.score for name, scorer in scorers.items()}
    veto = _veto(job, identity)
    served = {ADAPTER: job.run["adapter"]} if ADAPTER in models_of(e.arms) else None
    folder, weights = Path(job.run.facts["model"]["folder"]), "in bfloat16"
    if served:
        folder, weights = models.evaluated(folder, job.model.identity, job.recipe.distill.model_dump())
    neutral: dict[str, dict[str, float]] = {}
    for asked in _servers(e.arms, job.recipe.serving.endpoints):
        with _served(job, served if ADAPTER in asked else None, folder=folder) as endpoints:
            generator = _generator(job, endpoints, generation_at_evaluation(job.recipe))
            neutral |= asyncio.run(
                _ask(
                    generator,
                    lambda g=generator, models=asked: arms.ask_all(
                        job.run, job.recipe, held_out, g, Scoring(score["reward"]), veto, models
                    ),
                )
            )
    answers = evaluation.collect(job.run, job.recipe, held_out, score)
    if silent := [arm for arm in e.arms if not any(a["arm"] == arm for a in answers)]:
        raise ServingError(
            f"no answer at all from: {', '.join(silent)}", f"The reasons are in {job.run['log.txt']} and evaluation/."
        )
    about = {name: {"name": s.name, "unit": s.unit, "higher_is_better": True} for name, s in scorers.items()}
    numbers = evaluation.summarise(
        job.recipe,
        held_out,
        answers,
        {name: bool(a["higher_is_better"]) for name, a in about.items()},
        {arm: arms.seconds(job.run, arm) for arm in e.arms},
        neutral,
        _processors(job),
        trained_here="adapter" not in job.run.facts,
    )
    numbers["processors"] = _kind(job) or ("GPU" if job.run.facts["hardware"]["gpus"] else "core")
    numbers["neutral_texts"], numbers["neutral"] = max(map(len, neutral.values()), default=0), neutral
    numbers["scores"] = about
    numbers["served_on"] = (
        f"{job.model.id} as {', '.join(job.recipe.serving.endpoints)} serves it"
        if job.recipe.serving.endpoints
        else f"{job.model.id} {weights}" + (", adapter unmerged" if served else "")
    )
    evaluation.write_answers(job.run, answers, e.split)
    blind.retell(job.run)  # what people judged may have been other answers
    trained = job.run["adapter"] / WEIGHTS if served else None
    job.run.add_metrics("test_set", evaluation.count_adapters(job.runs, held_out, trained))
    say(
        f"evaluation  {len(answers)} answers of {len(e.arms)} arms on {len(held_out)} {e.split} prompts -> {job.run['evaluation']}"
    )
    return numbers


def _report(job: Job) -> Result:
    from dsc_hub import report

    result = report.build(job.run)
    say(f"report  {result['plots']} plots -> {job.run['report.html']}")
    return result


def _cards(job: Job) -> Result:
    from dsc_hub import cards

    return {"files": cards.build(job.run)}


def _publish(job: Job, account: Any) -> Result:
    from dsc_hub import cards, publish

    trained = job.run.marker("distill")["result"]["adapter_sha256"]
    if machine.file_hash(job.run["adapter"] / WEIGHTS) != trained:
        raise RunError(
            f"{job.run['adapter'] / WEIGHTS} is not what was trained and evaluated: its hash has changed",
            f"Remove {job.run['distill.done.json']} and run again.",
        )
    job.run.add_facts(repos=job.run.facts["repos"] | {"endpoint": account.endpoint})
    return publish.publish(
        job.run,
        account,
        Path(job.run.facts["model"]["folder"]),
        job.path.parent,
        job.recipe.publish,
        lambda: cards.build(job.run),
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
