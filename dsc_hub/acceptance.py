"""Acceptance rules, in one table: whether a chain accepts a revision or keeps its state. Pure; random numbers are
arguments.

Limitation: accepting with exp((r' - r)/T) alone samples p(x|c) exp(r(x)/T) only if the proposal is reversible with
respect to p(x|c). Critique-and-revise is not reversible, so the chain is a heuristic sampler, and `improve` is a hill
climb. Source: arXiv:2312.01957.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

# A rule of the table: (current reward, proposed reward, temperature, u uniform on [0, 1)) -> whether to accept.
# The current reward is -inf for a dirty first answer; it is always a number, `make_rule` handles missing ones.
RewardComparison = Callable[[float, float, float, float], bool]


class Rule(Protocol):
    """A rule at its temperature, as the chain calls it: return whether the proposal is accepted.

    Rewards are in the metric's unit; `u` is uniform on [0, 1).

    `current` is -inf for a dirty first answer, which any clean, scored revision beats. It is None for a clean first
    answer without a score: a missing score is not -inf, so rules that compare rewards accept nothing then.
    """

    def __call__(self, current: float | None, proposed: float, u: float) -> bool: ...


@dataclass(frozen=True)
class AcceptanceRule:
    """An entry of the table.

    For cards and page, with {temperature} to be filled in: `meaning` is a phrase ("a revision is kept if ..."),
    `caveat` a sentence that follows "it is a heuristic sampler."
    """

    accepts: RewardComparison
    meaning: str
    caveat: str
    compares: bool = True  # rewards; a rule that does not accepts a revision of an unscored answer, too
    can_descend: bool = False  # to a lower reward: its draws are not filtered, and their convergence can be measured


def metropolis(current: float, proposed: float, temperature: float, u: float) -> bool:
    """Metropolis test on the tempered reward: accept with probability min(1, exp((proposed - current) / T)).

    Rewards and T > 0 are in the metric's unit; the caller draws `u`, uniform on [0, 1). A proposal with a finite reward
    is always accepted over a state of reward -inf (a dirty first answer).
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
    """Return the rule that a recipe names, at its temperature. KeyError for an unknown name."""
    rule = RULES[name]

    def accepts(current: float | None, proposed: float, u: float) -> bool:
        if current is None:
            return not rule.compares
        return rule.accepts(current, proposed, temperature, u)

    return accepts
