"""The rules by which a chain keeps a revision or stays at its state. Pure; the dice are handed in.

What the Metropolis rule is not: exp((r' - r)/T) alone samples p(x|c) exp(r(x)/T) only if the proposal is reversible with
respect to p(x|c). Critique-and-revise is not reversible, so the chain is a heuristic sampler, and `improve` a hill climb.
Source: arXiv:2312.01957.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

RuleName = Literal["metropolis", "improve", "always"]


class Rule(Protocol):
    """Is the proposal kept? Rewards in the metric's unit; `u` is uniform on [0, 1).

    `current` is -inf for a first answer that is dirty, which any clean, scored revision beats, and None for a clean one
    that the scorer gave no value: absent is not -inf, so a rule that compares rewards keeps nothing beside it.
    """

    def __call__(self, current: float | None, proposed: float, u: float) -> bool: ...


def metropolis(current: float, proposed: float, temperature: float, u: float) -> bool:
    """Metropolis test on the tempered reward: keep the proposal with probability min(1, exp((proposed - current) / T)).

    Rewards are in the metric's unit, T > 0 in the same; `u` is uniform on [0, 1) and belongs to the caller. A state of
    reward -inf (a first answer that is dirty) is always left for a finite one.
    """
    return proposed >= current or u < math.exp((proposed - current) / temperature)


def make_rule(name: RuleName, temperature: float) -> Rule:
    """The rule a recipe names: `metropolis` at `temperature`, `improve` (strictly better) or `always`."""
    if name == "metropolis":
        return lambda current, proposed, u: current is not None and metropolis(current, proposed, temperature, u)
    if name == "improve":
        return lambda current, proposed, u: current is not None and proposed > current
    return lambda current, proposed, u: True
