"""Implementation of the stages: one function each, which works on the run folder and returns the marker's numbers.

Modules that do the work are imported inside the functions, so that a finished stage releases its memory and
`dsc --help` is instant.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_hub.chain.chain import VetoText
from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, models_of
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.models import is_at_endpoints, is_priced, models_by_server
from dsc_hub.config.recipe import generation_at_evaluation
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.adapters import WEIGHTS, has_effect
from dsc_hub.inference.weights import evaluation_weights
from dsc_hub.pipeline import pace, session
from dsc_hub.pipeline.context import RunContext
from dsc_hub.records import SPLITS, Prompt
from dsc_hub.report import formatting, sentences
from dsc_hub.runs import run, shards
from dsc_hub.runs.cost import cost_of, spent
from dsc_hub.runs.metrics_schema import Sampling
from dsc_hub.runs.results import current_metrics
from dsc_hub.runs.row_index import StoredPrompts
from dsc_hub.runs.run import Run
from dsc_hub.sampling.schedule import Ending
from dsc_hub.system import event_loop, hashing, machine
from dsc_hub.system.progress import say

if TYPE_CHECKING:
    from dsc_hub.metrics.loading import LoadedScorer

StageResult = dict[str, Any]
CHAINS_A_ROW = 5  # about; the quickstart takes 4 to 7
COST = (
    "prompt_tokens new_tokens seconds tokens_per_s cache_rate processor_hours processors scoring_s retries cost_usd"
).split()


def _run_prompts(context: RunContext) -> StageResult:
    prompts, dropped = load_prompts(
        context.recipe.prompts, context.path.parent, context.recipe.seed, context.identity["prompts"]
    )
    context.run["prompts.jsonl"].unlink(missing_ok=True)
    rows = context.run.rows("prompts.jsonl")
    for prompt in prompts:
        rows.append(prompt.as_row())
    rows.close()
    counts = {s: sum(p.split == s for p in prompts) for s in SPLITS}
    groups = {s: len({p.group for p in prompts if p.split == s}) for s in SPLITS}
    shown = ", ".join(f"{counts[s]} {s}" for s in counts)
    say(
        f"prompts  {len(prompts)} of {dropped.read} ({shown})  in {sum(groups.values())} groups  dropped: "
        f"{dropped.duplicates} duplicate, {dropped.overlaps} overlapping"
        + (f"  without a group: {dropped.ungrouped}" if dropped.ungrouped else "")
    )
    return counts | {"groups": groups} | dropped.as_metrics()


def _run_sampling(context: RunContext) -> StageResult:
    from dsc_hub.evaluation import arms
    from dsc_hub.metrics import loading
    from dsc_hub.pipeline import rounds
    from dsc_hub.sampling import sample

    if context.shard is None and shards.are_waiting(context.run):
        raise RunError(
            f"shards of this sampling are in {context.run[shards.FOLDER]}, and nothing was made of them yet",
            "`dsc merge RECIPE`, with the overrides they were sampled with, takes them. To sample without them, move "
            "that folder away.",
        )
    if context.recipe.rounds > 1:  # rounds.py has copied the chains of the round that is kept
        return sampled(context, prompts_to_sample(context), 0)
    started = time.monotonic()
    prompts = prompts_to_sample(context)
    identity = context.run.facts.identity

    @functools.cache
    def reward_and_veto() -> tuple[Any, VetoText]:
        reward = loading.load_named("reward", context.recipe, identity, context.path.parent)
        return reward.score, session.load_veto(context, identity)

    stored_turns = None
    if context.adapter is None and (
        stored_turns := sample.turns_of_others(context.run, rounds.sampled_by_the_base(context))
    ):
        say(f"sampling  {len(stored_turns):,} turns of other runs with this model and these settings are at hand")
    folder, adapters, model = None, None, None
    if context.adapter is not None:
        base, adapters, model = context.run.facts.model.weights, {ADAPTER: context.adapter}, ADAPTER
        folder, _ = evaluation_weights(base, context.model.identity, context.recipe.distill)
    requests = _requests_left(context, len(prompts))
    with session.served(
        context, adapters, folder=folder, requests=requests, meanwhile=reward_and_veto, stage="sampling"
    ) as endpoints:
        if _should_differ_from_base(adapters):
            generator = session.generator_of(context, endpoints)
            event_loop.run_coroutine(
                session.within(generator, partial(arms.check_adapter_acts, generator, arms.neutral_texts()))
            )
        tally, seconds = session.sample_chains(
            context,
            endpoints,
            prompts.values(),
            *reward_and_veto(),
            stored_turns,
            model,
            ending_early=prompts if context.recipe.ends_early else None,
        )
        if context.adapter is None:
            session.remember_sampling(context, tally, seconds, time.monotonic() - started)
    return sampled(context, prompts, tally.reused_turns, tally.ending)


def _requests_left(context: RunContext, prompts: int) -> int:
    """Return about how many requests a sampling still makes, at most."""
    from dsc_hub.sampling import sample

    recipe, each = context.recipe, 1 + 2 * context.recipe.chain.steps
    requests = (prompts * recipe.chain.chains_per_prompt - len(sample.read_chains(context.run))) * each
    if recipe.dataset.rows is not None:
        requests = min(requests, recipe.dataset.rows * CHAINS_A_ROW * each)
    if recipe.budget and recipe.budget.tokens is not None:
        requests = min(requests, recipe.budget.tokens // recipe.generation.most_tokens)
    return max(0, requests)


def prompts_to_sample(context: RunContext) -> StoredPrompts:
    """Return the prompts to sample: the training and validation prompts, restricted to the shard if there is one."""
    keep = context.shard.has if context.shard else bool
    return StoredPrompts(context.run.rows("prompts.jsonl"), "train", "validation", keep=keep)


def sampled(context: RunContext, wanted: StoredPrompts, reused_turns: int, ending: Ending | None = None) -> StageResult:
    """Compute, print and return the numbers of the chains in the run folder. ServingError if no chain finished.

    `ending`: how the sampling ended, if not by having sampled all chains of all `wanted` prompts.
    """
    from dsc_hub.metrics import loading
    from dsc_hub.sampling import sample, summary

    c = context.recipe.chain
    total = ending.chains if ending else len(wanted) * c.chains_per_prompt
    chains = sample.read_chains(context.run)
    reward = loading.load_named("reward", context.recipe, context.run.facts.identity, context.path.parent)

    def group_of(prompt_id: str) -> str:
        if (prompt := wanted.get(prompt_id)) is None:
            raise RunError(
                f"{context.run['chains.jsonl']} holds a chain of {prompt_id}, which is no prompt to be sampled here",
                "The row is of another run: remove its line, and run again.",
            )
        return prompt.group

    numbers = summary.chain_numbers(chains, group_of, total, c, reward.bounds)
    numbers |= cost_of(context.run, "sampling", "turns.jsonl", context.recipe) | {"reused_turns": reused_turns}
    numbers |= {"ended_by": ending.by} if ending else {}
    section = Sampling.model_validate(numbers)
    steps = "  ".join(f"step {s.step}: {s.accepted}/{s.proposals} accepted" for s in section.steps)
    say(
        f"sampling  {section.finished}/{total} chains  failed {section.failed}  {steps}  unscored "
        f"{section.unscored} -> {context.run['chains.jsonl']}"
    )
    say(f"  {formatting.sampling_cost(section)}")
    for line in summary.waterfall_lines(section):
        say(line)
    if section.stripped:
        say(f"  {section.stripped:>8,}  of these texts lost an opening that talked about the task")
    say(sentences.last_step_sentence(section))
    if ending:
        say(f"  {sentences.ending_sentence(section, context.recipe)}")
    if not section.finished and total:
        raise ServingError(
            f"not one of {total} chains could be finished", f"The reasons are in {context.run['failed.jsonl']}."
        )
    context.run.add_facts(cost=context.run.facts.cost | {"sampling": {k: numbers[k] for k in COST}})
    return numbers


def _run_dataset(context: RunContext) -> StageResult:
    from dsc_hub.data import dataset
    from dsc_hub.sampling import convergence, sample

    prompts = StoredPrompts(context.run.rows("prompts.jsonl"), *SPLITS)
    chains = sample.read_chains(context.run)
    if len(chains) != (finished := context.run.result("sampling")["finished"]):
        raise RunError(
            f"{context.run['chains.jsonl']} holds {len(chains)} chains, and {finished} were finished",
            f"Remove {context.run['sampling.done.json']} and run again: only what is missing is sampled.",
        )
    if "mixing" not in (sampled := context.run.metrics.get("sampling", {})):  # reused chains of an earlier version
        diagnosed = convergence.diagnostics(chains, lambda i: prompts[i].group, context.recipe.chain)
        context.run.add_metrics("sampling", sampled | diagnosed)
    counts = dataset.build_dataset(context.run, context.recipe, prompts, chains)
    dropped = ", ".join(f"{n} {why}" for why, n in counts["dropped"].items()) or "none"
    if (wanted := context.recipe.dataset.rows) and (made := counts["sft"]["train"]) < wanted:
        say(f"dataset  {made} of the {wanted} training rows that are wanted (dataset.rows); why not more is below")
    say(
        f"dataset  sft {counts['sft'].get('train', 0)} train, {counts['sft'].get('validation', 0)} validation  "
        f"preference {counts['preference'].get('train', 0)}, {counts['preference'].get('validation', 0)}  "
        f"dropped: {dropped} -> {context.run['dataset']}"
    )
    return counts


def _run_distill(context: RunContext) -> StageResult:
    from dsc_hub.distill import launcher, ranks
    from dsc_hub.pipeline import rounds

    if context.recipe.rounds > 1:
        return rounds.copy_adapter(context.run)
    training = ranks.train_together(context.run) if ranks.leads() else launcher.launch(context.run)
    return training.model_dump() | {"adapter_sha256": hashing.file_hash(context.run["adapter"] / WEIGHTS)}


def _should_differ_from_base(adapters: Mapping[str, Path] | None) -> bool:
    """Return whether a server has an adapter beside its base that changes the base's log-probabilities if applied."""
    return adapters is not None and has_effect(adapters[ADAPTER])


def _ask_arms(
    context: RunContext,
    held_out: Sequence[Prompt],
    scorers: Callable[[], Mapping[str, LoadedScorer]],
    folder: Path | None,
    adapters: Mapping[str, Path] | None,
    digests: Mapping[str | None, str],
) -> tuple[dict[str, dict[str, float]], pace.Pace | None]:
    """Generate the answers of the arms; those of base and teacher are reused if another run has them complete.

    `scorers` loads the scorers while a server starts. `folder` has the base's weights, `digests` are those of the arms
    by model (`reuse.arms_digest`). Return the nats of neutral texts by arm, and the pace without the rest of the stage;
    the pace is None if it is not representative of the base (reused or resumed work, external servers, a teacher).
    """
    from dsc_hub.evaluation import arms, reuse
    from dsc_hub.metrics.batching import BatchScorer

    e, recipe = context.recipe.evaluation, context.recipe
    is_fresh = not context.run["evaluation"].is_dir()
    veto = session.load_veto(context, context.run.facts.identity)
    reused: dict[str | None, dict[str, dict[str, float]]] = {}
    for model, inputs in digests.items():
        if source := reuse.adopt_arms(context.run, model, inputs, run.siblings(context.runs, recipe.name)):
            say(f"evaluation: the {model or 'base'}'s arms are those of {source}, whose inputs were the same")
        if (finished := reuse.finished_arms(context.run, model, inputs)) is not None:
            reused[model] = finished
    neutral = {arm: nats for finished in reused.values() for arm, nats in finished.items()}
    requests, new_tokens, seconds = 0, 0, 0.0
    groups = models_by_server(recipe)
    for together in groups:
        if not (models := [model for model in together if model not in reused]):
            continue
        is_teacher = TEACHER in models
        with session.served(
            context,
            adapters if ADAPTER in models else None,
            folder=None if is_teacher else folder,
            model=context.model if is_teacher else context.base,
            at_endpoints=is_at_endpoints(recipe, models[0]),
            meanwhile=scorers,
            stage="evaluation",
        ) as servers:
            generator = session.generator_of(context, servers, generation_at_evaluation(context.recipe))
            started = time.monotonic()
            work = partial(
                arms.answer_all,
                context.run,
                context.recipe,
                held_out,
                generator,
                BatchScorer(scorers()["reward"].score),
                veto,
                models,
                beside_base=_should_differ_from_base(adapters),
            )
            neutral |= event_loop.run_coroutine(session.within(generator, work))
            requests, new_tokens = requests + generator.requests, new_tokens + generator.new_tokens
            seconds += time.monotonic() - started
    if not is_fresh or reused or any(m == TEACHER or is_at_endpoints(recipe, m) for models in groups for m in models):
        return neutral, None
    return neutral, pace.Pace("evaluation", requests, len(held_out) * e.samples, new_tokens, seconds, 0.0)


def sampling_of_base(context: RunContext) -> str:
    """Return the sampling fingerprint without what the base's answers to held-out prompts do not depend on."""
    recipe = context.recipe
    alone = recipe.model_copy(update={"rounds": 1, "chain": recipe.chain.model_copy(update={"seed": None})})
    return stage_fingerprints(alone, context.identity)["sampling"]


def _run_evaluation(context: RunContext) -> StageResult:
    from dsc_hub.evaluation import arms, blind, reuse
    from dsc_hub.evaluation.answers import collect_answers, count_adapters, write_answers
    from dsc_hub.evaluation.summary import summarise_evaluation
    from dsc_hub.metrics import loading

    e, identity, started = context.recipe.evaluation, context.run.facts.identity, time.monotonic()
    if not (held_out := context.prompts(e.split)):
        raise RunError(f"there is no prompt in the split '{e.split}'", f"Set prompts.split.{e.split} above 0.")
    scorers = functools.cache(partial(loading.load_all, context.recipe, identity, context.path.parent))
    served = {ADAPTER: context.run["adapter"]} if ADAPTER in models_of(e.arms) else None
    digests = {
        model: reuse.arms_digest(context.recipe, model, sampling_of_base(context), identity.get("student", ""))
        for model in reuse.reusable_models(context.recipe)
    }
    with session.vllm_imported_early(context, "evaluation"):
        folder, weights = _base_weights(context)
        neutral, measured = _ask_arms(context, held_out, scorers, folder, served, digests)
    score = {name: scorer.score for name, scorer in scorers().items()}
    answers = collect_answers(context.run, context.recipe, held_out, score)
    if silent := [arm for arm in e.arms if not any(a.arm == arm for a in answers)]:
        raise ServingError(
            f"no answer at all from: {', '.join(silent)}",
            f"The reasons are in {context.run['log.txt']} and evaluation/.",
        )
    for model, inputs in digests.items():
        reuse.finish_arms(context.run, context.recipe, model, inputs, answers, len(held_out), neutral)
    own = {arm: not is_at_endpoints(context.recipe, ARMS[arm].model) for arm in e.arms}
    count, kind = session.processors(context, at_endpoints=not any(own.values()))
    about = {name: _described(scorer) for name, scorer in scorers().items()}
    trained = context.run["adapter"] / WEIGHTS if served else None
    looks = count_adapters(context.runs, held_out, trained) if e.split == "test" else {}
    numbers = summarise_evaluation(
        context.recipe,
        held_out,
        answers,
        about,
        {arm: arms.seconds(context.run, arm) for arm in e.arms},
        neutral,
        {arm: count if is_own else None for arm, is_own in own.items()},
        trained_here=context.run.facts.adapter is None,
        look=looks.get("position"),
    )
    numbers["processors"] = kind or ("GPU" if context.run.facts.hardware.gpus else "core")
    numbers["neutral_texts"], numbers["neutral"] = max(map(len, neutral.values()), default=0), neutral
    numbers["scores"] = about
    _add_cost(context, numbers)
    numbers["served_on"] = _served_on(context, weights)
    write_answers(context.run, answers, e.split)
    if measured:
        _remember_pace(context, measured, time.monotonic() - started)
    blind.record_tally(context.run)  # human verdicts may refer to other answers
    if looks:
        context.run.add_metrics("test_set", looks)
    else:
        context.run.drop_metrics("test_set")
    say(
        f"evaluation  {len(answers)} answers of {len(e.arms)} arms on {len(held_out)} {e.split} prompts -> "
        f"{context.run['evaluation']}"
    )
    return numbers


def _described(scorer: Any) -> dict[str, Any]:
    low, high = scorer.bounds
    return {"name": scorer.name, "unit": scorer.unit, "higher_is_better": True, "low": low, "high": high}


def _remember_pace(context: RunContext, measured: pace.Pace, total_s: float) -> None:
    other_s = round(total_s - measured.generating_s, 2)
    task = pace.task_of(context.recipe, context.identity["prompts"], "evaluation")
    pace.remember_pace(context.base.identity, replace(measured, other_s=other_s, task=task))


def _base_weights(context: RunContext) -> tuple[Path | None, str]:
    """Return the weights that the arms of the base and its adapter run on, and their description.

    None if no arm of the base is served here.
    """
    recipe, models = context.recipe, models_of(context.recipe.evaluation.arms)
    if all(model == TEACHER or is_at_endpoints(recipe, model) for model in models):
        return None, ""
    folder = context.run.facts.base.weights
    if ADAPTER not in models:
        return folder, "in bfloat16"
    return evaluation_weights(folder, context.base.identity, recipe.distill, recipe.evaluation.weights)


def _add_cost(context: RunContext, numbers: dict[str, Any]) -> None:
    """Add the USD of each arm at the priced servers, and of their turns of the evaluation together."""
    from dsc_hub.evaluation import arms

    recipe, run = context.recipe, context.run
    priced = [name for name in numbers["arms"] if is_priced(recipe, ARMS[name].model)]
    here = [name for name in numbers["arms"] if name not in priced and recipe.chain.critic]
    for name in (*priced, *here):
        numbers["arms"][name]["cost_usd"] = spent(recipe, arms.turns_of(run, name), critic_alone=name in here)
    parts = [
        spent(recipe, arms.all_turns(run, priced)) if priced else None,
        spent(recipe, arms.all_turns(run, here), critic_alone=True) if here else None,
    ]
    known = [part for part in parts if part is not None]
    numbers["cost_usd"] = sum(known) if len(known) == bool(priced) + bool(here) and known else None


def _served_on(context: RunContext, weights: str) -> str:
    """Describe in words the weights that the arms ran on and their compute dtype, without an address."""
    models = models_of(context.recipe.evaluation.arms)
    computed = ["computed in float32"] if machine.vllm_on_cpu() and machine.cpu_dtype() == "float32" else []
    adapter = ["adapter unmerged"] if ADAPTER in models else []
    out = []
    for model, name, described in (
        (None, context.base.id, [weights, *adapter, *computed]),
        (TEACHER, context.model.id, ["in bfloat16", *computed]),
    ):
        if model not in models and not (model is None and adapter):
            continue
        is_external = is_at_endpoints(context.recipe, model)
        ran = "as servers that ran already serve it" if is_external else ", ".join(described)
        out.append(f"{'the teacher ' if model else ''}{name} {ran}")
    return "; ".join(out)


def write_report(run: Run) -> StageResult:
    """Write the report page of an evaluated run."""
    from dsc_hub.report import page

    if (test_set := current_metrics(run).test_set) is not None:  # other adapters may have been scored on it since
        run.add_metrics("test_set", test_set.model_dump())
    result = page.build_page(run)
    say(f"report  {result['plots']} plots -> {run['report.html']}")
    return result


def write_cards(run: Run) -> StageResult:
    """Write the cards of an evaluated run."""
    from dsc_hub.report import cards

    return {"files": cards.build_cards(run)}


def publish_stage(context: RunContext, account: Any) -> StageResult:
    from dsc_hub.publish import upload
    from dsc_hub.report import cards

    trained = context.run.result("distill")["adapter_sha256"]
    if hashing.file_hash(context.run["adapter"] / WEIGHTS) != trained:
        raise RunError(
            f"{context.run['adapter'] / WEIGHTS} is not what was trained and evaluated: its hash has changed",
            f"Remove {context.run['distill.done.json']} and run again.",
        )
    context.run.add_facts(repos=context.run.raw_facts["repos"] | {"endpoint": account.endpoint})
    return upload.publish_run(
        context.run,
        account,
        context.run.facts.base.weights if context.recipe.publish.base else None,
        context.path.parent,
        context.recipe.publish,
        lambda: cards.build_cards(context.run),
        context.names_by,
    )


STAGE: dict[str, Callable[[RunContext], StageResult]] = {
    "prompts": _run_prompts,
    "sampling": _run_sampling,
    "dataset": _run_dataset,
    "distill": _run_distill,
    "evaluation": _run_evaluation,
    "report": lambda context: write_report(context.run),
    "cards": lambda context: write_cards(context.run),
}
