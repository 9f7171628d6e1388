"""Generation for a run: start or connect to servers, sample chains, record the cost."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import VetoText, no_veto
from dsc_hub.config.arms import ADAPTER
from dsc_hub.config.models import weights_loaded
from dsc_hub.config.recipe import effective_veto as veto_of
from dsc_hub.config.recipe import model_server
from dsc_hub.config.serving import GenerationConfig
from dsc_hub.data import prompts
from dsc_hub.inference import base_model
from dsc_hub.inference.adapters import has_effect
from dsc_hub.pipeline import pace
from dsc_hub.pipeline.context import RunContext, announce_servers
from dsc_hub.records import Chain, Prompt, Turn, TurnKey
from dsc_hub.runs.cost import add_session, spent_of
from dsc_hub.runs.row_index import RowIndex
from dsc_hub.runs.run import Run
from dsc_hub.system import cache, event_loop, machine
from dsc_hub.system.progress import duration, say


@contextlib.contextmanager
def served(
    context: RunContext,
    adapters: Mapping[str, Path] | None = None,
    log: Path | None = None,
    folder: Path | None = None,
    requests: int = 0,
    model: base_model.BaseModel | None = None,
    at_endpoints: bool = True,
    meanwhile: Callable[[], object] = lambda: None,
    stage: str = "",
) -> Iterator[list[Any]]:
    """Yield endpoints: those that the recipe names, or vLLM servers started here.

    Servers are started here if the recipe names none, or if what is asked is not `at_endpoints`. They load the weights
    in `folder` of `model` (default: of the model that writes the chains) and write to `log` (default: vllm.log).
    `requests` is the number of requests of a sampling, which decides whether compilation is worthwhile. `meanwhile` is
    work that needs no server; it is done while they start, and left out if they run already. How long that takes is
    recorded for the `stage`.
    """
    from dsc_hub.inference import external, rendering, servers, thinking_models

    section, model = context.recipe.serving, model or context.model
    if section.endpoints and at_endpoints:
        endpoints = external.external(model_server(context.recipe))
        if not (context.student or model.is_behind_api):  # else its template is not that of the training rows
            rendering.check_rendering(endpoints, base_model.materialize(model, weights=False), context.recipe)
        yield endpoints
        return
    folder = folder or context.run.facts.model.weights
    places = servers.replica_places(section)
    paces = pace.known_paces(model.identity)
    task = pace.task_of(context.recipe, context.identity["prompts"], "sampling")
    new_tokens = pace.likely_tokens(paces, requests, context.recipe.generation.most_tokens, task)
    # Compiled code multiplies an adapter's weights for the base's requests, too: 440 tokens/s, and 745 without one.
    compiled = not adapters and servers.worth_compiling(new_tokens, pace.fastest(paces))
    started = time.monotonic()
    with servers.serve_model(
        folder,
        section,
        log or context.run["vllm.log"],
        adapters,
        places=places,
        compiled=compiled,
        more=thinking_models.vllm_arguments(folder, context.recipe.generation),
        meanwhile=meanwhile,
    ) as endpoints:
        replicas = f" in {len(places)} replicas" if len(places) > 1 else ""
        what = " and the adapter" if adapters else ""
        seconds = time.monotonic() - started
        say(f"vLLM serves {model.id}{what}{replicas}, ready after {duration(seconds)}")
        if stage:
            starts = context.run.metrics.get("server_starts", {})
            context.run.add_metrics("server_starts", starts | {stage: round(starts.get(stage, 0.0) + seconds, 1)})
        rendering.check_rendering(endpoints, folder, context.recipe)
        yield endpoints


@contextlib.contextmanager
def vllm_imported_early(context: RunContext, stage: str, log: Path | None = None) -> Iterator[None]:
    """Import vLLM while the block prepares what `stage` needs, if it starts a server in the block (vllm.py)."""
    if not weights_loaded(context.recipe, [stage]):
        yield
        return
    from dsc_hub.inference import vllm

    with vllm.imported_early(context.recipe.serving, log or context.run["vllm.log"]):
        yield


def should_differ_from_base(adapters: Mapping[str, Path] | None) -> bool:
    """Return whether a server has an adapter beside its base that changes the base's log-probabilities if applied."""
    return adapters is not None and has_effect(adapters[ADAPTER])


def load_veto(context: RunContext, identity: Mapping[str, str]) -> VetoText:
    """Return the recipe's veto on revisions; without one return `no_veto`, which skips the scorers' thread."""
    from dsc_hub.metrics import loading
    from dsc_hub.metrics.batching import BatchScorer

    return BatchScorer(loading.load_veto_scorer(context.recipe, identity)) if veto_of(context.recipe) else no_veto


def sample_chains(
    context: RunContext,
    endpoints: list[Any],
    some: Iterable[Prompt],
    score: Any,
    veto: VetoText,
    known: RowIndex | None = None,
    model: str | None = None,
    ending_early: Mapping[str, Prompt] | None = None,
) -> tuple[Any, float]:
    """Sample the prompts' chains into the run folder and record the session's cost; return the tally and the seconds.

    `model` is the name at the servers of the model that answers, criticises and revises; None: the base.
    `ending_early` are the same prompts by id, if the recipe's number of rows or budget may end the sampling.
    KeyboardInterrupt after Ctrl-C; finished chains are on disk then.
    """
    from dsc_hub.inference import servers
    from dsc_hub.metrics.batching import BatchScorer
    from dsc_hub.sampling import sample, schedule

    generator, scoring, before = generator_of(context, endpoints), BatchScorer(score), servers.prefix_cache(endpoints)
    started, reused = time.monotonic(), Counter[str]()
    plan = None
    if ending_early is not None:
        plan = schedule.Schedule(context.recipe, ending_early, *spent_of(context.run, "sampling", "turns.jsonl"))
    try:
        tally = event_loop.run_coroutine(
            within(
                generator,
                lambda: sample.run_with_line(
                    context.run,
                    context.recipe,
                    some,
                    partial(generator.complete, model=model),
                    scoring,
                    veto=veto,
                    criticise=partial(generator.criticise, model=model),
                    known=known,
                    schedule=plan,
                    reused=reused,
                    level=generator.level,
                    scoring_s=lambda: max(s.busy_seconds() for s in (scoring, veto) if isinstance(s, BatchScorer)),
                ),
            )
        )
    finally:  # a failed session has a cost too
        seconds = round(time.monotonic() - started, 2)
        scoring_s = round(scoring.seconds, 2)
        _add_cost(
            context, generator, servers.cache_use(before, servers.prefix_cache(endpoints)), seconds, reused, scoring_s
        )
    if tally.waits_for_scores:
        say(
            "sampling  chains waited for their scores most of the time: a smaller scorer, or one at a server, is faster"
        )
    if tally.interrupted:
        raise KeyboardInterrupt
    return tally, seconds


def _add_cost(
    context: RunContext,
    generator: Any,
    cache_use: tuple[int | None, int | None],
    seconds: float,
    reused: Mapping[str, int],
    scoring_s: float,
) -> None:
    """Record what a session of sampling cost. `cache_use`: prompt tokens found in the prefix cache, and looked up."""
    (cached, looked_up), (count, kind) = cache_use, processors(context)
    session = {
        "seconds": seconds,
        "new_tokens": generator.new_tokens,
        "reused_tokens": reused["tokens"],
        "cached_tokens": cached,
        "looked_up_tokens": looked_up,
        "retries": generator.retries,
        "scoring_s": scoring_s,
        "processors": count,
        "kind": kind,
    }
    add_session(context.run, "sampling", session)


def remember_sampling(context: RunContext, tally: Any, seconds: float, total_s: float) -> None:
    """Store the pace of a sampling for later estimates, if servers started here generated all of it in one session.

    Requests are those of whole chains: of chains that end early (`chain.good_enough`) each then takes less, as it will
    again.
    """
    turns = 1 + 2 * context.recipe.chain.steps
    if not (context.recipe.serving.endpoints or tally.reused_turns or tally.failed or tally.ending is not None):
        other_s = max(0.0, total_s - seconds)
        pace.remember_pace(
            context.model.identity,
            pace.Pace(
                "sampling",
                tally.total * turns,
                tally.total,
                tally.new_tokens,
                seconds,
                round(other_s, 2),
                pace.task_of(context.recipe, context.identity["prompts"], "sampling"),
            ),
        )


def generator_of(context: RunContext, endpoints: list[Any], settings: GenerationConfig | None = None) -> Any:
    """Return a generator over the endpoints. `settings` replaces the recipe's generation section.

    Servers of others are tested (`external.connect`), unless this process did so before.
    """
    from dsc_hub.inference import external
    from dsc_hub.inference.client import Generator
    from dsc_hub.inference.pacing import StatedQuota

    section, settings = context.recipe.serving, settings or context.recipe.generation
    critic = external.critic_endpoint(context.recipe, settings)
    if all(e.restart for e in endpoints):  # started here: what is said of the recipe's endpoints is not of them
        concurrency = "auto" if isinstance(section.concurrency, tuple) else section.concurrency
        return Generator(endpoints, settings, section.request_timeout_s, critic, concurrency)
    endpoints = external.connect_base(endpoints, context.recipe, settings)
    quota = None
    if section.requests_per_minute or section.tokens_per_minute:
        quota = StatedQuota(section.requests_per_minute, section.tokens_per_minute)
    return Generator(endpoints, settings, section.request_timeout_s, critic, section.concurrency, quota)


async def within(generator: Any, work: Callable[[], Any]) -> Any:
    async with generator:
        return await work()


def processors(context: RunContext, at_endpoints: bool = True) -> tuple[int, str] | tuple[None, None]:
    """Return the number of processors of the servers and their kind ("core", "GPU"); (None, None) if external.

    With `at_endpoints=False` of the servers that are started here although the recipe names some.
    """
    from dsc_hub.inference import servers

    section = context.recipe.serving
    if section.endpoints and at_endpoints:
        return None, None
    if machine.vllm_on_cpu():
        return machine.cores(), "core"
    return len(servers.replica_places(section)) * section.tensor_parallel, "GPU"


@dataclass(frozen=True)
class Tried:
    """Whole chains with their prompts, sampled in `seconds`; `failed` chains were not finished.

    `thoughts` are what the model thought before its turns, by the key of the turn; `cut` are the keys of the turns that
    came to the length limit.
    """

    chains: list[tuple[Prompt, Chain]]
    thoughts: dict[TurnKey, str]
    cut: set[TurnKey]
    seconds: float
    failed: int


def sample_a_few(context: RunContext, count: int) -> Tried:
    """Sample the first `count` training prompts in a temporary folder."""
    from dsc_hub.chain.hygiene import LENGTH
    from dsc_hub.metrics import loading
    from dsc_hub.sampling import sample

    announce_servers(context.recipe)
    loaded, _ = prompts.load_prompts(
        context.recipe.prompts, context.path.parent, context.recipe.seed, context.identity["prompts"]
    )
    tried_prompts = [p for p in loaded if p.split == "train"][:count]
    recipe = context.recipe.model_copy(
        update={"chain": context.recipe.chain.model_copy(update={"chains_per_prompt": 1})}
    )
    with tempfile.TemporaryDirectory(prefix="dsc-try-") as folder:
        tried = replace(context, recipe=recipe, run=Run(Path(folder)))
        started, log = time.monotonic(), cache.writable_home() / "try.vllm.log"
        with contextlib.ExitStack() as stack:
            stack.enter_context(vllm_imported_early(tried, "sampling", log))
            weights = None if recipe.serving.endpoints else base_model.materialize(context.model)
            reward = loading.load_named("reward", context.recipe, context.identity, context.path.parent)
            veto = load_veto(context, context.identity)
            endpoints = stack.enter_context(served(tried, folder=weights, log=log))
            tally, seconds = sample_chains(tried, endpoints, tried_prompts, reward.score, veto)
            remember_sampling(tried, tally, seconds, time.monotonic() - started)
        by_id = {p.id: p for p in tried_prompts}
        if failed := list(tried.run.rows("failed.jsonl")):
            say(f"{len(failed)} failed, the first: {failed[0]['reason']}")
        turns = list(tried.run.rows("turns.jsonl").as_type(Turn))
        thoughts = {t.key: t.thought for t in turns if t.thought}
        cut = {t.key for t in turns if t.finish_reason == LENGTH}
        chains = [(by_id[c.prompt_id], c) for c in sample.read_chains(tried.run)]
        return Tried(chains, thoughts, cut, seconds, tally.failed)
