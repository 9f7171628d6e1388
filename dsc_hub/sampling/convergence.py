"""Did the chains settle, and what did the last step give? Finished chains in, numbers out. Pure.

R-hat and effective sample size (Vehtari et al., Bayesian Analysis 16, 2021; ArviZ) ask whether several chains of one prompt
visit the same rewards. They mean something only for `metropolis`, whose chains may go down again: an `improve` chain is a
hill climb, and its rewards are no draws from anything. Even then critique-and-revise is not reversible, so what the
chains settle on is the heuristic sampler's own distribution.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dsc_hub import stats
from dsc_hub.acceptance import RULES
from dsc_hub.records import Chain, word

LEAST_STEPS, LEAST_CHAINS = 20, 2
R_HAT_LIMIT = 1.01  # the usual word for "the chains agree"


def mixing(chains: Iterable[Chain], acceptance: str, steps: int, chains_per_prompt: int) -> dict[str, Any]:
    """R-hat and effective sample size of the reward over the prompts' chains, which come prompt by prompt.

    {estimable, reason} where they mean nothing; else also prompts, left_out (prompts with a state that has no reward, too
    few finished chains, or chains that never moved), stuck (prompts whose chains stand still at different rewards: without
    an R-hat, and counted as above the limit), r_hat {median, highest, above_limit (share of prompts)} and ess
    {median, lowest} in draws, of `draws` for each prompt.
    """
    why = []
    if not RULES[acceptance].can_descend:
        why.append(f"the rule is '{acceptance}', whose chains only climb")
    if chains_per_prompt < LEAST_CHAINS:
        why.append(f"{chains_per_prompt} chain a prompt, {LEAST_CHAINS} are needed")
    if steps < LEAST_STEPS:
        why.append(f"{steps} steps, {LEAST_STEPS} are needed")
    if why:
        return {"estimable": False, "reason": "; ".join(why)}
    from arviz_stats.base import array_stats

    r_hats, sizes, left_out, stuck = [], [], 0, 0
    for _, own in itertools.groupby(chains, lambda c: c.prompt_id):
        rows = [[chain.reward_after(i) for i in range(1, steps + 1)] for chain in own]
        draws = np.array(rows, dtype=float)  # [chains, steps]; NaN where a state has no reward
        if len(rows) < LEAST_CHAINS or not np.isfinite(draws).all() or (draws == draws[0, 0]).all():
            left_out += 1
            continue
        half = steps // 2  # R-hat compares halves of chains; of an odd number the draw in the middle is in neither
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
        "draws": steps * chains_per_prompt,
        "r_hat": {
            "median": float(np.median(r_hats)),
            "highest": max(r_hats),
            "above_limit": (stuck + sum(r > R_HAT_LIMIT for r in r_hats)) / (stuck + len(r_hats)),
        },
        "ess": {"median": float(np.median(sizes)), "lowest": min(sizes)},
    }


def last_step(chains: Iterable[Chain], group_of: Callable[[str], str], steps: int) -> dict[str, Any]:
    """What the last step gave: {gain, first_clean, chains}.

    `gain` is the change of reward of the chains whose state was clean and scored before it (a paired difference over
    groups), `first_clean` how many chains it gave their first such state, of `chains`. Under `improve` the gain can't
    be negative, and what one more step would give is not told by it.
    """
    before, after, groups = array("d"), array("d"), array("Q")
    fresh = total = 0
    for chain in chains:
        total += 1
        previous, final = chain.reward_after(steps - 1), chain.reward_after(steps)
        if previous is not None and final is not None:
            before.append(previous)
            after.append(final)
            groups.append(word(group_of(chain.prompt_id)))
        elif final is not None:
            fresh += 1
    gain = stats.paired_difference(np.asarray(after), np.asarray(before), np.asarray(groups))
    return {"gain": gain, "first_clean": fresh, "chains": total}
