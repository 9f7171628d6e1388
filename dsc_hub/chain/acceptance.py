"""Acceptance rules: whether a chain accepts a revision or keeps its state. Pure; random numbers are arguments.

Limitation: accepting with exp((r' - r)/T) alone samples p(x|c) exp(r(x)/T) only if the proposal is reversible with
respect to p(x|c). Critique-and-revise is not reversible, so the chain is a heuristic sampler, and `improve` is a hill
climb. Source: arXiv:2312.01957.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

RuleName = Literal["metropolis", "improve", "always"]


class Rule(Protocol):
    """Return whether the proposal is accepted. Rewards in the metric's unit; `u` is uniform on [0, 1).

    `current` is -inf for a dirty first answer, which any clean, scored revision beats. It is None for a clean first
    answer without a score: a missing score is not -inf, so rules that compare rewards accept nothing then.
    """

    def __call__(self, current: float | None, proposed: float, u: float) -> bool: ...


def metropolis(current: float, proposed: float, temperature: float, u: float) -> bool:
    """Metropolis test on the tempered reward: accept with probability min(1, exp((proposed - current) / T)).

    Rewards and T > 0 are in the metric's unit; the caller draws `u`, uniform on [0, 1). A proposal with a finite reward
    is always accepted over a state of reward -inf (a dirty first answer).
    """
    return proposed >= current or u < math.exp((proposed - current) / temperature)


def make_rule(name: RuleName, temperature: float) -> Rule:
    """Return the rule that a recipe names: `metropolis` at `temperature`, `improve` (strictly better) or `always`."""
    if name == "metropolis":
        return lambda current, proposed, u: current is not None and metropolis(current, proposed, temperature, u)
    if name == "improve":
        return lambda current, proposed, u: current is not None and proposed > current
    return lambda current, proposed, u: True
