"""The arms of an evaluation: which model answers, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

ADAPTER = "distilled"  # the name under which the adapter is served


@dataclass(frozen=True)
class Arm:
    """`model`: None is the base. `way`: one plain answer, a whole chain, or the best of several answers. `title` is for people."""

    model: str | None
    way: Literal["answer", "chain", "best"]
    title: str

    @property
    def prefix(self) -> str:
        """Of the files that hold what this arm's model wrote."""
        return f"evaluation/{self.model}." if self.model else "evaluation/"


# All that is known of the arms (arms.py says what they are for); in this order they are asked.
ARMS = {
    "base": Arm(None, "answer", "base"),
    "self_critique": Arm(None, "chain", "self-critique"),
    "best_of_n": Arm(None, "best", "best of n"),
    "distilled": Arm(ADAPTER, "answer", "distilled"),
    "distilled_self_critique": Arm(ADAPTER, "chain", "distilled + self-critique"),
}


def models_of(arms: Iterable[str]) -> tuple[str | None, ...]:
    """Which models the arms ask, the base (None) first."""
    wanted = set(arms)
    return tuple(dict.fromkeys(arm.model for name, arm in ARMS.items() if name in wanted))


def judges_claim(arms: Sequence[str]) -> bool:
    """Is "distilled is better than its base" judged where these arms are compared? The first is the baseline."""
    return arms[0] == "base" and "distilled" in arms
