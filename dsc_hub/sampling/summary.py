"""Summary of the chains: rewards by step, acceptance, and reasons for rejection. Chains in, numbers out."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dsc_hub import stats
from dsc_hub.chain.chain import (
    BY_VETO,
    NOT_BETTER,
    NOT_COMPARABLE,
    UNSCORED,
)
from dsc_hub.config.sampling import ChainConfig
from dsc_hub.records import Chain, id_as_uint64
from dsc_hub.runs.metrics_schema import Sampling
from dsc_hub.sampling.convergence import diagnostics


def chain_numbers(
    chains: Iterable[Chain],
    group_of: Callable[[str], str],
    total: int,
    chain: ChainConfig,
    reward_range: stats.Bounds = stats.UNBOUNDED,
) -> dict[str, Any]:
    """Return all numbers of metrics.json's section `sampling` that follow from the chains.

    Its cost is missing. `group_of` maps a prompt id to its group; `total` is the number of planned chains.
    Intervals of rewards are cut at `reward_range`.
    """
    numbers = summary(chains, group_of, total, chain.steps, reward_range) | diagnostics(chains, group_of, chain)
    if (count := len(chain.pairs)) > 1:
        numbers["pairs"] = _by_pair(chains, count)
    return numbers | {"intervals": stats.interval_rule()}


def _by_pair(chains: Iterable[Chain], count: int) -> list[dict[str, int]]:
    """Return the proposals and accepted revisions of each of `count` pairs of texts."""
    proposals, accepted = Counter[int](), Counter[int]()
    for step in (step for chain in chains for step in chain.steps):
        proposals[step.pair] += 1
        accepted[step.pair] += step.accepted
    return [{"proposals": proposals[pair], "accepted": accepted[pair]} for pair in range(count)]


def summary(
    chains: Iterable[Chain],
    group_of: Callable[[str], str],
    total: int,
    steps: int,
    reward_range: stats.Bounds = stats.UNBOUNDED,
) -> dict[str, Any]:
    """Return the numbers of the chains: rewards by step with intervals over groups, and the outcome of each proposal.

    `group_of` maps a prompt id to its group. All rewards are of clean, scored texts: first answers, proposals, and the
    states after each step (`Chain.reward_after`). In every step proposals = accepted + sum of rejected; finished +
    failed = chains.
    """
    counts, dirty, rejected = Counter[str](), Counter[str](), [Counter[str]() for _ in range(steps)]
    # Eight bytes per number and chain; NaN for a missing value.
    groups = array("Q")
    proposed, states = [array("d") for _ in range(steps)], [array("d") for _ in range(1 + steps)]

    def estimate(values: array[float]) -> dict[str, Any]:
        is_known = ~np.isnan(values)
        return stats.estimate(np.asarray(values)[is_known], np.asarray(groups)[is_known], bounds=reward_range)

    for chain in chains:
        groups.append(id_as_uint64(group_of(chain.prompt_id)))
        states[0].append(_or_nan(chain.reward_after(0)))
        dirty.update([chain.answer_defect] if chain.answer_defect else [])
        counts["finished"] += 1
        counts["unscored"] += chain.answer_score.value is None
        counts["usable"] += not chain.final_defect
        counts["stripped"] += bool(chain.answer_raw)
        for i in range(steps):
            states[i + 1].append(_or_nan(chain.reward_after(i + 1)))
            if i >= len(chain.steps):  # it was good enough before
                proposed[i].append(math.nan)
                continue
            s = chain.steps[i]
            counts["unscored"] += s.score.value is None
            counts["stripped"] += bool(s.raw)
            rejected[i].update([s.rejected])
            proposed[i].append(_or_nan(None if s.defect else s.score.value))
    return {
        "chains": total,
        "finished": counts["finished"],
        "failed": total - counts["finished"],
        "dirty_answers": dirty.total(),
        "dirty_answers_by_reason": dict(dirty.most_common()),
        "unscored": counts["unscored"],
        "usable": counts["usable"],
        "reward_range": None if reward_range == stats.UNBOUNDED else list(reward_range),
        "first_reward": estimate(states[0]),
        "stripped": counts["stripped"],
        "steps": [
            {
                "step": i + 1,
                "proposals": rejected[i].total(),
                "accepted": rejected[i].pop("", 0),
                "rejected": dict(rejected[i].most_common()),
                "reward_proposed": estimate(proposed[i]),
                "reward_state": estimate(states[i + 1]),
            }
            for i in range(steps)
        ],
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def waterfall(sampling: Sampling) -> list[tuple[str, int]]:
    """Return the outcome of the texts, as (label, count). Losses are negative; sums give the totals."""
    losses: Counter[str] = Counter()
    for step in sampling.steps:
        losses.update(step.rejected)
    later = (UNSCORED, *BY_VETO, NOT_BETTER, NOT_COMPARABLE)  # reasons for which clean revisions are rejected
    dirty = sum(losses[r] for r in losses if r not in later)
    proposals = sum(s.proposals for s in sampling.steps)
    return [
        ("first answers", sampling.finished),
        *((reason, -n) for reason, n in sampling.dirty_answers_by_reason.items()),
        ("clean first answers", sampling.finished - sampling.dirty_answers),
        ("revisions proposed", proposals),
        *((reason, -n) for reason, n in losses.most_common() if reason not in later),
        ("clean revisions", proposals - dirty),
        *((reason, -losses[reason]) for reason in later if losses[reason]),
        ("accepted revisions", sum(s.accepted for s in sampling.steps)),
        ("chains", sampling.finished),
        ("without a clean final state", sampling.usable - sampling.finished),
        ("chains with a clean final state", sampling.usable),
    ]


def waterfall_lines(sampling: Sampling) -> list[str]:
    """Format `waterfall` for the terminal: losses are indented and have a minus sign."""
    return [
        f"  {n:>8,}  {label}" if n >= 0 else f"  {n:>8,}    {label}".replace("-", "\N{MINUS SIGN}")
        for label, n in waterfall(sampling)
    ]
