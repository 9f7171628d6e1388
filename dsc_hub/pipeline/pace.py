"""Runtime estimates: stored measurements of past stages on this machine in, a range of seconds out.

A single speed is misleading: few requests do not fill the engine, server starts take time, and a run beside other work
is slow. So the last few measurements of each stage are kept, and an estimate is a range together with its speeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dsc_hub.config.recipe import Recipe
from dsc_hub.inference.concurrency import FIRST
from dsc_hub.system import cache
from dsc_hub.system.hashing import digest

PACE_FILE = "pace.json"
KEPT_MEASUREMENTS = 8  # measurements kept per stage
LEAST_TOKENS = 1000  # new tokens; a speed measured on fewer tokens is unreliable
# Speed of an adapter on a CPU as a fraction of the base's (inference/vllm_lora.py), until an evaluation was measured.
SLOWEST_ADAPTER = 0.5
# Times of the same work on a quiet machine differ by up to 4 %, mean lengths of a hundred chains by as much.
SPREAD = 1.1
USUAL_LENGTH = 0.5  # mean length of a text as a share of its limit, if none was measured; three quickstart runs: 0.45
NEAR = 1.25  # factor between numbers of concurrent requests that count as alike


@dataclass(frozen=True, slots=True)
class Pace:
    """Measurement of one stage.

    `requests` made, how many could run `at_once` (chains, or answers), `new_tokens` of all requests, seconds of
    generation, and seconds of everything else (engine starts, scorers). `task` is that of `task_of`; "": not recorded.
    """

    stage: str
    requests: int
    at_once: int
    new_tokens: int
    generating_s: float
    other_s: float
    task: str = ""

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.generating_s


def remember_pace(model_identity: str, pace: Pace) -> None:
    """Store a measurement; drop the oldest ones of the stage beyond KEPT. Measurements of few tokens are not stored."""
    if pace.new_tokens < LEAST_TOKENS or pace.generating_s <= 0:
        return
    stored = known_paces(model_identity)
    others = [p for p in stored if p.stage != pace.stage]
    same = [p for p in stored if p.stage == pace.stage]
    cache.remember_value(
        PACE_FILE, model_identity, [asdict(p) for p in (*others, *same[1 - KEPT_MEASUREMENTS :], pace)]
    )


def known_paces(model_identity: str) -> list[Pace]:
    """Return the measurements of this model on this machine, oldest first. Damaged entries of the cache are ignored."""
    out = []
    rows = cache.recall_value(PACE_FILE, model_identity)
    for row in rows if isinstance(rows, list) else ():
        try:
            pace = Pace(**row)
            is_valid = pace.new_tokens > 0 and pace.generating_s > 0 and pace.requests > 0 and pace.at_once > 0
        except TypeError:
            continue
        if is_valid:
            out.append(pace)
    return out


@dataclass(frozen=True)
class ExpectedTime:
    """Range of a stage's duration, `low` to `high` in seconds, by speeds of `slow` to `fast` tokens per second."""

    low: float
    high: float
    slow: float
    fast: float


def fastest(paces: Sequence[Pace]) -> float | None:
    """Return the new tokens per second of the fastest sampling; None if none was measured."""
    return max((p.tokens_per_s for p in paces if p.stage == "sampling"), default=None)


def likely_tokens(paces: Sequence[Pace], requests: int, max_new_tokens: int, task: str) -> int:
    """Return about how many new tokens so many requests of a sampling write.

    Texts are as long as those of the last sampling of the same task, else of this model, else USUAL_LENGTH of the
    limit.
    """
    sampled = [p for p in paces if p.stage == "sampling"]
    measured = [p for p in sampled if p.task == task] or sampled
    length = measured[-1].new_tokens / measured[-1].requests if measured else USUAL_LENGTH * max_new_tokens
    return round(requests * min(length, max_new_tokens))


def task_of(recipe: Recipe, prompts_identity: str, stage: str) -> str:
    """Return a digest of what the lengths of a stage's texts depend on, apart from the model."""
    chain, prompts = recipe.chain, recipe.prompts
    texts = [chain.critique, chain.revision, chain.system, chain.principles, chain.steps]
    evaluated = [recipe.evaluation.arms, recipe.evaluation.temperature] if stage == "evaluation" else []
    ended = [chain.good_enough] if stage == "sampling" and chain.good_enough is not None else []
    generation = recipe.generation.model_dump(mode="json")
    return digest(stage, prompts_identity, prompts.templates, prompts.column, texts, generation, evaluated + ended)


def expect(
    paces: Sequence[Pace],
    stage: str,
    requests: int,
    at_once: int,
    max_new_tokens: int,
    starts: int,
    task: str = "",
    has_adapter: bool = False,
) -> ExpectedTime | None:
    """Return the expected duration of a stage; None without data.

    Of the measurements those of the stage count (else sampling's), of these those of the same task, of these those with
    about as many concurrent requests. Speeds go from the median (so that one run beside other work does not count as
    typical) to the upper quartile, scaled by the number of concurrent requests relative to the measurement: fewer lower
    the slow speed, more raise the fast one. Starts go from the fastest to the slowest.

    Texts are as long as the means that were measured of the same task, give or take SPREAD; of other tasks, low: as
    short as the shortest measured mean; high: of full length. `starts` is the number of engine starts; it is used if
    the stage itself was never measured, and sampling's start time then stands for each. `has_adapter`: an adapter, too,
    is served on a CPU.
    """
    stage_paces = [p for p in paces if p.stage == stage]
    measured = stage_paces or [p for p in paces if p.stage == "sampling"]
    if not measured or not requests:
        return None
    alike = [p for p in measured if task and p.task == task]
    at_once = min(at_once, FIRST)
    measured = _nearest(alike or measured, at_once)
    ratios = [at_once / min(p.at_once, FIRST) for p in measured]
    fast = _upper_quartile([p.tokens_per_s * max(1.0, r) for p, r in zip(measured, ratios, strict=True)])
    slow = statistics.median_low(p.tokens_per_s * min(1.0, r) for p, r in zip(measured, ratios, strict=True))
    slow *= SLOWEST_ADAPTER if has_adapter and not stage_paces else 1
    other_times, n_starts = [p.other_s for p in measured], 1 if stage_paces else starts
    lengths = [p.new_tokens / p.requests for p in measured]
    spread = SPREAD if alike else 1.0
    longest = max(lengths) * spread if alike else max_new_tokens
    return ExpectedTime(
        low=requests * min(max_new_tokens, *lengths) / spread / fast + n_starts * min(other_times),
        high=requests * min(max_new_tokens, longest) / slow + n_starts * max(other_times),
        slow=slow,
        fast=fast,
    )


def _nearest(paces: Sequence[Pace], at_once: int) -> list[Pace]:
    """Return the measurements whose number of concurrent requests is nearest, or about as near (NEAR)."""
    distances = [abs(math.log(at_once / min(p.at_once, FIRST))) for p in paces]
    limit = min(distances) + math.log(NEAR)
    return [p for p, distance in zip(paces, distances, strict=True) if distance <= limit]


def _upper_quartile(speeds: Sequence[float]) -> float:
    """Return the value that three quarters of the speeds do not exceed; of up to three the highest."""
    return sorted(speeds)[math.ceil(0.75 * len(speeds)) - 1]
