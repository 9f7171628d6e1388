"""The stage `evaluation`: the answers of all arms to held-out prompts, scored and compared."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_hub.config.arms import ADAPTER, ARMS, TEACHER, models_of
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.models import is_at_endpoints, is_priced, models_by_server
from dsc_hub.config.recipe import generation_at_evaluation
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.adapters import WEIGHTS
from dsc_hub.inference.weights import evaluation_weights
from dsc_hub.pipeline import pace, session
from dsc_hub.pipeline.context import RunContext
from dsc_hub.records import Prompt
from dsc_hub.runs import run
from dsc_hub.runs.cost import spent
from dsc_hub.system import event_loop, machine
from dsc_hub.system.progress import say

if TYPE_CHECKING:
    from dsc_hub.metrics.loading import LoadedScorer


def run_evaluation(context: RunContext) -> dict[str, Any]:
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
                beside_base=session.should_differ_from_base(adapters),
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
