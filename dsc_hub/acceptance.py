"""The rules by which a chain keeps a revision or stays at its state: one table. Pure; the dice are passed in.

What the Metropolis rule is not: exp((r' - r)/T) alone samples p(x|c) exp(r(x)/T) only if the proposal is reversible with
respect to p(x|c). Critique-and-revise is not reversible, so the chain is a heuristic sampler, and `improve` a hill climb.
Source: arXiv:2312.01957.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Rule(Protocol):
    """Is the proposal kept? Rewards in the metric's unit; `u` is uniform on [0, 1).

    `current` is -inf for a first answer that is dirty, which any clean, scored revision beats, and None for a clean one
    that the scorer gave no value: absent is not -inf, so a rule that compares rewards keeps nothing beside it.
    """

    def __call__(self, current: float | None, proposed: float, u: float) -> bool: ...


@dataclass(frozen=True)
class AcceptanceRule:
    """`keeps(current, proposed, temperature, u)`. `meaning` and `caveat` are for readers of cards, with {temperature} filled in."""

    keeps: Callable[[float, float, float, float], bool]
    meaning: str
    caveat: str
    compares: bool = True  # rewards; one that doesn't keeps a revision beside an unscored answer, too
    can_descend: bool = False  # to a lower reward: then its draws are not filtered, and convergence can be measured


def metropolis(current: float, proposed: float, temperature: float, u: float) -> bool:
    """Metropolis test on the tempered reward: keep the proposal with probability min(1, exp((proposed - current) / T)).

    Rewards are in the metric's unit, T > 0 in the same; `u` is uniform on [0, 1) and belongs to the caller. A state of
    reward -inf (a first answer that is dirty) is always left for a finite one.
    """
    return proposed >= current or u < math.exp((proposed - current) / temperature)


RULES = {
    "metropolis": AcceptanceRule(
        metropolis,
        "a revision is kept with probability min(1, exp(Δreward / T)), T = {temperature}",
        "The rule 'metropolis' at T = {temperature:g} does not mend that.",
        can_descend=True,
    ),
    "improve": AcceptanceRule(
        lambda current, proposed, temperature, u: proposed > current,
        "a revision is kept if its reward is strictly higher",
        "With the rule 'improve' it is a hill climb.",
    ),
    "always": AcceptanceRule(
        lambda current, proposed, temperature, u: True,
        "every clean revision is kept",
        "With the rule 'always' nothing is rejected for its reward: it is plain self-critique.",
        compares=False,
    ),
}


def make_rule(name: str, temperature: float) -> Rule:
    """The rule that a recipe names, at its temperature. KeyError for a name that RULES lacks."""
    rule = RULES[name]

    def keeps(current: float | None, proposed: float, u: float) -> bool:
        if current is None:
            return not rule.compares
        return rule.keeps(current, proposed, temperature, u)

    return keeps
