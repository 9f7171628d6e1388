"""The arms of an evaluation: which model answers, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

ADAPTER = "distilled"  # model name of the served adapter
TEACHER = "teacher"  # the model that writes the chains, where a student is trained


@dataclass(frozen=True)
class Arm:
    """One arm of an evaluation.

    `model`: None is the base, the weights that are trained: the student, or without one the model that writes the
    chains. `way`: a single answer, a whole chain, or the best of several answers. `title` is for display.
    """

    model: str | None
    way: Literal["answer", "chain", "best"]
    title: str

    @property
    def prefix(self) -> str:
        """Path prefix of the files with the outputs of this arm's model."""
        return prefix_of(self.model)


# What the arms of a model write, one file each; the answers after the first are those of the way "best".
ROWS = ("turns", "chains", "unanswered", "failed", "seconds", "best_of_n.turns", "best_of_n.unanswered")


def prefix_of(model: str | None) -> str:
    return f"evaluation/{model}." if model else "evaluation/"


def name_at_server(model: str | None) -> str | None:
    """Return the name by which requests ask for a model; None: the server's own. Only an adapter has another one."""
    return ADAPTER if model == ADAPTER else None


def model_files(model: str | None) -> tuple[str, ...]:
    """Return all files, in the run folder, that the arms of a model write."""
    return tuple(f"{prefix_of(model)}{rows}.jsonl" for rows in ROWS)


# The table of arms (evaluation/arms.py describes them), in the order in which they run.
ARMS = {
    "base": Arm(None, "answer", "base"),
    "self_critique": Arm(None, "chain", "self-critique"),
    "best_of_n": Arm(None, "best", "best of n"),
    "distilled": Arm(ADAPTER, "answer", "distilled"),
    "distilled_self_critique": Arm(ADAPTER, "chain", "distilled + self-critique"),
    "teacher": Arm(TEACHER, "answer", "teacher"),
    "teacher_self_critique": Arm(TEACHER, "chain", "teacher + self-critique"),
}


def models_of(arms: Iterable[str]) -> tuple[str | None, ...]:
    """Return the models that the arms use, the base (None) first."""
    names = set(arms)
    return tuple(dict.fromkeys(arm.model for name, arm in ARMS.items() if name in names))


def judges_claim(arms: Sequence[str]) -> bool:
    """Return whether comparing these arms tests "distilled is better than its base". The first is the baseline."""
    return arms[0] == "base" and "distilled" in arms
