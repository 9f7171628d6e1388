"""Did the chains settle, and would more steps help? Finished chains in, numbers and a plain sentence out. Pure.

R-hat and effective sample size (Vehtari et al., Bayesian Analysis 16, 2021; ArviZ) ask whether several chains of one prompt
visit the same rewards. They mean something only for `metropolis`, whose chains may go down again: an `improve` chain is a
hill climb, and its rewards are no draws from anything. Even then critique-and-revise is not reversible, so what the
chains settle on is the heuristic sampler's own distribution.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from dsc_hub import stats
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
    if acceptance != "metropolis":
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
        rows = [[state_reward(chain, i) for i in range(1, steps + 1)] for chain in own]
        draws = np.array(rows)  # [chains, steps]
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


def state_reward(chain: Chain, step: int) -> float:
    """Reward of the chain's state after `step` steps; -inf while that is a first answer that is dirty or unscored."""
    kept = [s.score.value for s in chain.steps[:step] if s.accepted and s.score.value is not None]
    if kept:
        return kept[-1]
    return -math.inf if chain.answer_defect or chain.answer_score.value is None else chain.answer_score.value


def last_step(chains: Iterable[Chain], group_of: Callable[[str], str], steps: int) -> dict[str, Any]:
    """What the last step gave: `gain` in reward of chains whose state was clean before it (an estimate over groups), `first_clean` the
    chains that it gave their first clean state, and `sentence`, whether a further one can be expected to help."""
    before, after, groups = array("d"), array("d"), array("Q")
    fresh = total = 0
    for chain in chains:
        total += 1
        was, is_now = state_reward(chain, steps - 1), state_reward(chain, steps)
        if math.isfinite(was):
            before.append(was)
            after.append(is_now)
            groups.append(word(group_of(chain.prompt_id)))
        elif math.isfinite(is_now):
            fresh += 1
    gain = stats.paired_difference(np.asarray(after), np.asarray(before), np.asarray(groups))
    return {"gain": gain, "first_clean": fresh, "sentence": _sentence(gain, fresh, total, steps)}


def _sentence(gain: Mapping[str, Any], fresh: int, chains: int, steps: int) -> str:
    new = f"gave {fresh} of {chains} chains their first clean answer" if fresh else ""
    if gain["mean"] is None or gain["low"] is None:
        return f"Step {steps} {new or 'changed nothing that can be measured'}: too few clean chains to say whether more steps help."
    told = f"{gain['mean']:.2f} ({gain['low']:.2f} to {gain['high']:.2f}".replace("-", "\N{MINUS SIGN}")
    told += f"; {gain['n']} chains in {gain['groups']} groups)"
    if gain["low"] > 0:
        return f"Step {steps} still changed the reward by {told}{f' and {new}' if new else ''}: one more step may pay."
    if fresh > 0.05 * chains:
        return (
            f"Step {steps} {new}, while the reward of the others changed by {told}: one more step may give more rows."
        )
    return f"Step {steps} changed the reward by {told}{f' and {new}' if new else ''}: more steps are not shown to help."
