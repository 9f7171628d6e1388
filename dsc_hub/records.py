"""Records shared by the stages: frozen dataclasses, each with one JSON form (`dataclasses.asdict` / `from_row`).

Prompt -> Turn ... -> Chain(Step ...) -> dataset rows
                   -> Answer of an arm of the evaluation
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")

Split = Literal["train", "validation", "test"]
Role = Literal["answer", "critique", "revision"]
TurnKey = tuple[str, int, int, str]  # prompt id, chain, step, role
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Message = dict[str, str]  # {role, content}: a turn of a conversation
Tool = dict[str, Any]  # {type: function, function: {name, description, parameters}}: a JSON schema


def prompt_id(text: str, messages: Sequence[Message] = (), tools: Sequence[Tool] = ()) -> str:
    """Return the id of a prompt: the first 16 hex digits of the SHA-256 of its text.

    For a conversation (`Prompt.messages`) it is that of the canonical JSON of messages and tools.
    """
    if messages:
        text = json.dumps([*messages, *tools], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def id_as_uint64(text: str) -> int:
    """Return an id as a 64-bit integer. Hex ids keep their sort order; any other id is hashed."""
    if re.fullmatch(r"[0-9a-f]{1,16}", text):
        return int(text, 16)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One instruction: a text, or a conversation that ends with it.

    `group` is the unit of splitting and of the statistics (a film, a topic). `kind` is the category that some metrics
    need (harmful, harmless). `messages` is the whole conversation, with its own system text if it has one; `text` is
    its last user turn. It is empty for a single user turn without tools. `tools` are shown to the model.
    """

    id: str
    text: str
    group: str
    split: Split
    kind: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()

    @property
    def conversation(self) -> list[Message]:
        """The messages; of a single text the one user turn."""
        return list(self.messages) or [{"role": "user", "content": self.text}]

    @property
    def system(self) -> str | None:
        """The conversation's own system text; None if it has none."""
        first = self.conversation[0]
        return first["content"] if first["role"] == "system" else None

    @property
    def transcript(self) -> str:
        """The text, or the conversation as plain text for people: "User: ...", "Assistant: ..."."""
        if len(self.conversation) == 1:
            return self.text
        return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in self.messages)

    def as_row(self) -> dict[str, Any]:
        """Return the row of prompts.jsonl; that of a single text has neither messages nor tools."""
        row = asdict(self)
        return {key: value for key, value in row.items() if value or key not in ("messages", "tools")}


@dataclass(frozen=True, slots=True)
class Score:
    """A reward in the metric's unit, or None with the reason why the text is unscored. A missing score is not zero."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished generation: a row of turns.jsonl, keyed by (prompt_id, chain, step, role)."""

    prompt_id: str
    chain: int
    step: int  # 0 is the first answer, 1.. the critiques and revisions
    role: Role
    text: str
    finish_reason: str  # "stop": the model ended the text; "length": cut; "thinking": cut before there was a text
    prompt_tokens: int
    new_tokens: int
    seed: int
    request: str = ""  # digest of the role and the messages that were sent
    thought: str = ""  # what the model thought before the text; never scored, shown to the next turn or trained on

    @property
    def key(self) -> TurnKey:
        return (self.prompt_id, self.chain, self.step, self.role)


@dataclass(frozen=True, slots=True)
class Step:
    """One critique and revision, with the outcome.

    `defect` is the hygiene reason against the revision ("" if it is clean). `rejected` is the reason why the chain kept
    its state ("" if the revision was accepted): a defect, "unscored", a veto, or the reason of the acceptance rule.
    `raw` is the model's whole text if an opening was stripped ("" otherwise); defect and score refer to the stripped
    text. `pair` is the number of the recipe's pair of texts that asked for it, from 0.
    """

    number: int
    critique: str
    revision: str
    score: Score
    defect: str
    rejected: str
    raw: str = ""
    pair: int = 0

    @property
    def accepted(self) -> bool:
        return not self.rejected


@dataclass(frozen=True, slots=True)
class Chain:
    """One finished chain: a row of chains.jsonl, keyed by (prompt_id, number)."""

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
        """The step whose revision is the chain's final state; 0 means the first answer."""
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
        """Why the final state is not usable, or "". Accepted revisions are clean; a first answer may be dirty."""
        if self.state_step:
            return ""
        return self.answer_defect or ("unscored" if self.answer_score.value is None else "")

    def reward_after(self, step: int) -> float | None:
        """Return the reward of the chain's clean, scored state after `step` steps (0: the first answer).

        None while the state is a dirty or unscored first answer.
        """
        kept = [s.score.value for s in self.steps[:step] if s.accepted]
        if kept:
            return kept[-1]
        return None if self.answer_defect else self.answer_score.value

    def as_row(self) -> dict[str, Any]:
        """Return the row of chains.jsonl; steps with the first pair of texts don't say so."""
        row = asdict(self)
        for step in row["steps"]:
            if not step["pair"]:
                del step["pair"]
        return row


AnswerKey = tuple[str, int]  # prompt id, sample


@dataclass(frozen=True, slots=True)
class Answer:
    """One evaluated answer: a row of evaluation/answers.jsonl, keyed by (arm, prompt_id, sample)."""

    arm: str
    prompt_id: str
    sample: int
    group: str
    prompt: str
    text: str
    finish_reason: str
    new_tokens: int  # of all turns and candidates of the arm
    prompt_tokens: int
    defect: str  # hygiene reason; "" if clean
    raw: str = ""  # the whole text if an opening was stripped
    reward: float | None = None  # None: unscored; why, if there is such a scorer, is in `unscored_reason`
    second: float | None = None
    third: float | None = None
    unscored_reason: str = ""  # of the reward; "" if it is scored
    second_unscored_reason: str = ""  # rows of an older dsc have none
    third_unscored_reason: str = ""

    def score(self, name: str) -> float | None:
        """Return the score "reward", "second" or "third"; None: unscored, or not recorded."""
        value: float | None = getattr(self, name)
        return value

    def unscored(self, name: str) -> str:
        """Return why the score "reward", "second" or "third" is missing; "" if it is not, or not recorded."""
        reason: str = getattr(self, _reason_of(name))
        return reason

    def scored(self, name: str, score: Score) -> Answer:
        """Return the answer with a score."""
        changes: dict[str, Any] = {name: score.value, _reason_of(name): score.reason}
        return replace(self, **changes)


def _reason_of(name: str) -> str:
    """Return the name of the field with the reason why a score is missing."""
    return "unscored_reason" if name == "reward" else f"{name}_unscored_reason"


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}  # by kind of record: building one takes milliseconds


def from_row(kind: type[T], row: Mapping[str, Any]) -> T:
    """Convert a JSON row to a record of type `kind`; ValueError (pydantic's) for missing keys or wrong types.

    Unknown keys are ignored.
    """
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    record: T = _ADAPTERS[kind].validate_python(row)
    return record
