"""The nouns that cross stages. Frozen, plain, and each with one JSON form (`dataclasses.asdict` / `from_row`).

Prompt -> Turn ... -> Chain(Step ...) -> dataset rows
                   -> Answer, what an arm of the evaluation gave
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")

Split = Literal["train", "validation", "test"]
Role = Literal["answer", "critique", "revision"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def prompt_id(text: str) -> str:
    """Identity of a prompt: the first 16 hex digits of the SHA-256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def word(text: str) -> int:
    """An id as 64 bits: hex digits as their number, so that the order stays; anything else by its hash."""
    if re.fullmatch(r"[0-9a-f]{1,16}", text):
        return int(text, 16)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction. `group` is the unit of splitting and of the statistics (a film, a topic), `kind` what sort of prompt it
    is, where a metric asks (harmful, harmless)."""

    id: str
    text: str
    group: str
    split: Split
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward in the metric's unit, or None with the reason why the text could not be scored. Absent is not zero."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished generation: a line of turns.jsonl, keyed by (prompt_id, chain, step, role)."""

    prompt_id: str
    chain: int
    step: int  # 0 is the first answer, 1.. the critiques and revisions
    role: Role
    text: str
    finish_reason: str  # "stop": the model ended by itself; "length": cut at max_new_tokens
    prompt_tokens: int
    new_tokens: int
    seed: int
    request: str = ""  # digest of the role and the messages that were sent

    @property
    def key(self) -> tuple[str, int, int, str]:
        return (self.prompt_id, self.chain, self.step, self.role)


@dataclass(frozen=True, slots=True)
class Step:
    """One critique and revision, and what became of it.

    `defect` is the hygiene reason for which the revision can't be kept ("" if it is clean); `rejected` says why the chain
    stayed at its state ("" if the revision was accepted): a defect, "unscored", or the acceptance rule's own word. `raw` is
    the model's whole text where an opening was stripped off it ("" where nothing was): defect and score are the rest's.
    """

    number: int
    critique: str
    revision: str
    score: Score
    defect: str
    rejected: str
    raw: str = ""

    @property
    def accepted(self) -> bool:
        return not self.rejected


@dataclass(frozen=True, slots=True)
class Chain:
    """One whole chain: a line of chains.jsonl, keyed by (prompt_id, number)."""

    prompt_id: str
    number: int
    answer: str
    answer_score: Score
    answer_defect: str
    steps: tuple[Step, ...]
    answer_raw: str = ""  # as Step.raw

    @property
    def key(self) -> tuple[str, int]:
        return (self.prompt_id, self.number)

    @property
    def state_step(self) -> int:
        """The step whose text is the chain's final state; 0 means the first answer."""
        return max((s.number for s in self.steps if s.accepted), default=0)

    @property
    def final(self) -> str:
        step = self.state_step
        return self.steps[step - 1].revision if step else self.answer

    @property
    def final_score(self) -> Score:
        step = self.state_step
        return self.steps[step - 1].score if step else self.answer_score

    @property
    def final_defect(self) -> str:
        """Why the final state can't be used ("" if it can): accepted revisions are clean, a first answer may not be."""
        if self.state_step:
            return ""
        return self.answer_defect or ("unscored" if self.answer_score.value is None else "")

    def reward_after(self, step: int) -> float | None:
        """Reward of the chain's clean, scored state after `step` steps (0: the first answer); None while the state is a
        first answer that is dirty or unscored."""
        kept = [s.score.value for s in self.steps[:step] if s.accepted]
        if kept:
            return kept[-1]
        return None if self.answer_defect else self.answer_score.value

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated answer: a line of evaluation/answers.jsonl, keyed by (arm, prompt_id, sample)."""

    arm: str
    prompt_id: str
    sample: int
    group: str
    prompt: str
    text: str
    reward: float | None  # None: unscored, and `unscored_reason` says why
    second: float | None
    third: float | None
    unscored_reason: str
    finish_reason: str
    new_tokens: int  # of all turns and candidates that the arm took
    prompt_tokens: int
    defect: str  # of hygiene; "" if clean
    raw: str = ""  # the whole text where an opening was stripped off it


def from_row(kind: type[T], row: Mapping[str, Any]) -> T:
    """A row of JSON as what it stands for; ValueError (pydantic's) if something is missing or of another type. Keys that
    the noun doesn't know are left out."""
    return _adapter(kind).validate_python(row)


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)
