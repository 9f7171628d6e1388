"""Convergence diagnostics of the chains and the gain of the last step. Finished chains in, numbers out. Pure.

R-hat and effective sample size (Vehtari et al., Bayesian Analysis 16, 2021; ArviZ) measure whether several chains of
one prompt visit the same rewards. They are meaningful only for rules whose chains can go down again (`metropolis`): an
`improve` chain is a hill climb, and its rewards are not draws from a distribution. Critique-and-revise is not
reversible, so even `metropolis` chains converge to the heuristic sampler's own distribution.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dsc_hub import stats
from dsc_hub.acceptance import RULES
from dsc_hub.config.sampling import ChainConfig
from dsc_hub.records import Chain, id_as_uint64

LEAST_STEPS, LEAST_CHAINS = 20, 2
R_HAT_LIMIT = 1.01  # the usual limit for agreement of the chains


def diagnostics(
    chains: Iterable[Chain], group_of: Callable[[str], str], chain: ChainConfig
) -> dict[str, dict[str, Any]]:
    """Return the keys `mixing` and `last_step` of the section `sampling` of metrics.json."""
    return {
        "mixing": mixing(chains, chain.acceptance, chain.steps, chain.chains_per_prompt),
        "last_step": last_step(chains, group_of, chain.steps),
    }


def mixing(chains: Iterable[Chain], acceptance: str, steps: int, chains_per_prompt: int) -> dict[str, Any]:
    """Return R-hat and effective sample size of the reward over the prompts' chains; `chains` are ordered by prompt.

    {estimable, reason} if they are not meaningful. Otherwise also prompts, left_out (prompts with a state without
    reward, too few finished chains, or chains that never moved), stuck (prompts whose chains stand still at different
    rewards: without an R-hat, and counted as above the limit), draws (per prompt), r_hat {median, highest, above_limit
    (share of prompts)} and ess {median, lowest} in draws.
    """
    reasons = []
    if not RULES[acceptance].can_descend:
        reasons.append(f"the rule is '{acceptance}', whose chains only climb")
    if chains_per_prompt < LEAST_CHAINS:
        reasons.append(f"{chains_per_prompt} chain a prompt, {LEAST_CHAINS} are needed")
    if steps < LEAST_STEPS:
        reasons.append(f"{steps} steps, {LEAST_STEPS} are needed")
    if reasons:
        return {"estimable": False, "reason": "; ".join(reasons)}
    from arviz_stats.base import array_stats

    r_hats, sizes, left_out, stuck, most_chains = [], [], 0, 0, 0
    for _, prompt_chains in itertools.groupby(chains, lambda c: c.prompt_id):
        rows = [[chain.reward_after(i) for i in range(1, steps + 1)] for chain in prompt_chains]
        most_chains = max(most_chains, len(rows))
        draws = np.array(rows, dtype=float)  # [chains, steps]; NaN if a state has no reward
        if len(rows) < LEAST_CHAINS or not np.isfinite(draws).all() or (draws == draws[0, 0]).all():
            left_out += 1
            continue
        half = steps // 2  # R-hat compares halves of chains; with an odd number the middle draw is in neither
        if not any(np.ptp(part, axis=1).any() for part in (draws[:, :half], draws[:, -half:])):
            stuck += 1
            continue
        r_hats.append(float(array_stats.rhat(draws, chain_axis=0, draw_axis=1)))
        sizes.append(float(array_stats.ess(draws, chain_axis=0, draw_axis=1)))
    if not r_hats:
        return {"estimable": False, "reason": "no prompt has two chains that moved and were scored at every step"}
    return {
        "estimable": True,
        "reason": "",
        "prompts": len(r_hats),
        "left_out": left_out,
        "stuck": stuck,
        "draws": steps * most_chains,
        "r_hat": {
            "median": float(np.median(r_hats)),
            "highest": max(r_hats),
            "above_limit": (stuck + sum(r > R_HAT_LIMIT for r in r_hats)) / (stuck + len(r_hats)),
        },
        "ess": {"median": float(np.median(sizes)), "lowest": min(sizes)},
    }


def last_step(chains: Iterable[Chain], group_of: Callable[[str], str], steps: int) -> dict[str, Any]:
    """Return the gain of the last step: {gain, first_clean, chains}.

    `gain` is the change of reward of the chains whose state was clean and scored before the step (a paired difference
    over groups). `first_clean` is the number of chains, of `chains`, that reached their first such state in the step.
    Under `improve` the gain cannot be negative, and it does not predict the gain of a further step.
    """
    before, after, groups = array("d"), array("d"), array("Q")
    first_clean = total = 0
    for chain in chains:
        total += 1
        if len(chain.steps) < steps:  # it was good enough before
            continue
        previous, final = chain.reward_after(steps - 1), chain.reward_after(steps)
        if previous is not None and final is not None:
            before.append(previous)
            after.append(final)
            groups.append(id_as_uint64(group_of(chain.prompt_id)))
        elif final is not None:
            first_clean += 1
    gain = stats.paired_difference(np.asarray(after), np.asarray(before), np.asarray(groups))
    return {"gain": gain, "first_clean": first_clean, "chains": total}
