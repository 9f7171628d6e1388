"""The stage `sampling`: chains of all training and validation prompts, or as many as rows are wanted."""

from __future__ import annotations

import functools
import importlib
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from dsc_hub.config.arms import ADAPTER
from dsc_hub.config.recipe import reward_terms
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.weights import evaluation_weights
from dsc_hub.pipeline import session
from dsc_hub.pipeline.context import RunContext
from dsc_hub.report import formatting, sentences
from dsc_hub.runs import shards
from dsc_hub.runs.cost import cost_of
from dsc_hub.runs.metrics_schema import Sampling
from dsc_hub.runs.row_index import StoredPrompts
from dsc_hub.sampling.schedule import Ending
from dsc_hub.system import event_loop
from dsc_hub.system.progress import say

if TYPE_CHECKING:
    from dsc_hub.metrics.loading import LoadedScorer

CHAINS_A_ROW = 5  # about; the quickstart takes 4 to 7
COST = (
    "prompt_tokens new_tokens seconds tokens_per_s cache_rate processor_hours processors scoring_s retries cost_usd"
).split()


def run_sampling(context: RunContext) -> dict[str, Any]:
    from dsc_hub.evaluation import arms
    from dsc_hub.metrics import registry
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
    load_reward = functools.cache(partial(_load_reward, context))
    load_veto = functools.cache(partial(session.load_veto, context, context.run.facts.identity))
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
        context,
        adapters,
        folder=folder,
        requests=requests,
        meanwhile=lambda: (load_reward(), load_veto()),
        stage="sampling",
    ) as endpoints:
        if session.should_differ_from_base(adapters):
            generator = session.generator_of(context, endpoints)
            event_loop.run_coroutine(
                session.within(generator, partial(arms.check_adapter_acts, generator, arms.neutral_texts()))
            )
        if not all(map(registry.is_packaged, reward_terms(context.recipe, "reward").values())):
            load_reward()  # what may fail to load does so before anything is asked; others load while answers come
        tally, seconds = session.sample_chains(
            context,
            endpoints,
            prompts.values(),
            lambda texts, prompts: load_reward().score(texts, prompts),
            load_veto(),
            stored_turns,
            model,
            ending_early=prompts if context.recipe.ends_early else None,
        )
        if context.adapter is None:
            session.remember_sampling(context, tally, seconds, time.monotonic() - started)
    return sampled(context, prompts, tally.reused_turns, tally.ending)


def _load_reward(context: RunContext) -> LoadedScorer:
    from dsc_hub.metrics import loading

    importlib.import_module("scipy.stats")  # for the numbers at the end: a second in which the server would stand still
    return loading.load_named("reward", context.recipe, context.run.facts.identity, context.path.parent)


def _nothing_finished(context: RunContext, total: int) -> ServingError:
    failed = context.run.rows("failed.jsonl")
    reasons = Counter(str(row.get("reason")) for row in failed).most_common(1)
    most = f"; {reasons[0][1]} times: {reasons[0][0]}" if reasons else ""
    return ServingError(f"not one of {total} chains could be finished{most}", f"All reasons are in {failed.path}.")


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


def sampled(
    context: RunContext, wanted: StoredPrompts, reused_turns: int, ending: Ending | None = None
) -> dict[str, Any]:
    """Compute, print and return the numbers of the chains in the run folder. ServingError if no chain finished.

    `ending`: how the sampling ended, if not by having sampled all chains of all `wanted` prompts.
    """
    from dsc_hub.sampling import sample, summary

    c = context.recipe.chain
    total = ending.chains if ending else len(wanted) * c.chains_per_prompt
    chains = sample.read_chains(context.run)
    reward = _load_reward(context)

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
    if not section.finished and total:
        raise _nothing_finished(context, total)
    say(sentences.last_step_sentence(section))
    if ending:
        say(f"  {sentences.ending_sentence(section, context.recipe)}")
    context.run.add_facts(cost=context.run.facts.cost | {"sampling": {k: numbers[k] for k in COST}})
    return numbers
