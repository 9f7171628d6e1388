"""The texts of a run as the report's browser shows them: whole chains, and the answers of the arms side by side.

They go into the page as gzipped JSON in base64, so that 20,000 chains of a paragraph a turn are some ten megabytes.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from dsc_hub.config.arms import ARMS
from dsc_hub.records import Answer, AnswerKey, Chain, Prompt, Role, Score, Step, Turn, TurnKey
from dsc_hub.runs.metrics_schema import Evaluation
from dsc_hub.runs.results import answers
from dsc_hub.runs.run import Run
from dsc_hub.system.progress import clean

LONGEST_TEXT = 4000  # characters of one text; a model that never stops must not fill the page
MOST_CHAINS = 20_000  # on one page
NO_TEXTS: dict[str, Any] = {"first": 1, "prompts": [], "chains": [], "answers": []}


class RunTexts:
    """The texts of a run, read once: `page(n)` has what the n-th page shows, the first one the answers, too."""

    def __init__(self, run: Run, evaluation: Evaluation | None) -> None:
        self.prompts = {p.id: p for p in run.rows("prompts.jsonl").as_type(Prompt)}
        self.chains = sorted(run.rows("chains.jsonl").as_type(Chain), key=lambda c: c.key)
        self.trained = _trained_chains(run)
        self.thoughts = thoughts_of(run)
        self.answers = _answers_by_prompt(run, evaluation) if evaluation else []

    @property
    def pages(self) -> int:
        """Number of pages that the chains take."""
        return max(1, -(-len(self.chains) // MOST_CHAINS))

    def page(self, number: int) -> dict[str, Any]:
        """Return {first, prompts, chains, answers} of a page, from 1 on.

        `first` is the place of its first chain, from 1 on. `prompts` are {id, text, group, split, kind}, and of a
        conversation `before`, its earlier turns {role, text}; chains and answers name theirs by its place. A chain is
        {prompt, chain, row, answer, steps}, with `row` where it gave a training row. Answers are {prompt, sample, sign,
        arms}, where `sign` is -1 if less is better.
        """
        start = (number - 1) * MOST_CHAINS
        shown: dict[str, int] = {}

        def place(prompt_id: str) -> int:
            return shown.setdefault(prompt_id, len(shown))

        chains = [
            {
                "prompt": place(c.prompt_id),
                "chain": c.number,
                "row": c.key in self.trained,
                "answer": _text_shown(c.answer, c.answer_score, c.answer_defect, c.answer_raw)
                | self._thought(c, 0, "answer", "thought"),
                "steps": [
                    _step_shown(s)
                    | self._thought(c, s.number, "critique", "critique_thought")
                    | self._thought(c, s.number, "revision", "thought")
                    for s in c.steps
                ],
            }
            for c in self.chains[start : start + MOST_CHAINS]
        ]
        answers = [row | {"prompt": place(row["prompt"])} for row in (self.answers if number == 1 else [])]
        listed = [self.prompts.get(i) or Prompt(i, "(the prompt is not in prompts.jsonl)", "", "test") for i in shown]
        prompts = [_prompt_shown(p) for p in listed]
        return {"first": start + 1, "prompts": prompts, "chains": chains, "answers": answers}

    def _thought(self, chain: Chain, step: int, role: Role, key: str) -> dict[str, str]:
        thought = self.thoughts.get((chain.prompt_id, chain.number, step, role))
        return {key: shorten(thought)} if thought else {}


def thoughts_of(run: Run, file: str = "turns.jsonl") -> dict[TurnKey, str]:
    """Return what the model thought before its turns, by the key of the turn; turns without a thought are left out."""
    return {turn.key: turn.thought for turn in run.rows(file).as_type(Turn) if turn.thought}


def _prompt_shown(prompt: Prompt) -> dict[str, Any]:
    """A conversation without a group has its id for one, which says nothing to people."""
    group = prompt.text if prompt.group == prompt.id else prompt.group
    row = {"id": prompt.id, "text": shorten(prompt.text), "group": shorten(group), "split": prompt.split}
    before = [{"role": m["role"], "text": shorten(m["content"])} for m in prompt.messages[:-1]]
    return row | {"kind": prompt.kind} | ({"before": before} if before else {})


def _text_shown(text: str, score: Score, defect: str, raw: str) -> dict[str, Any]:
    out: dict[str, Any] = {"text": shorten(text), "reward": score.value}
    optional = {"defect": defect, "unscored": score.reason, "raw": shorten(raw)}
    return out | {key: value for key, value in optional.items() if value}


def _step_shown(step: Step) -> dict[str, Any]:
    text = _text_shown(step.revision, step.score, step.defect, step.raw)
    return text | {"critique": shorten(step.critique), "rejected": step.rejected}


def _trained_chains(run: Run) -> set[tuple[str, int]]:
    """Return the chains with a row that the objective trains or validates on; none before the dataset is done."""
    if run.marker("dataset") is None:
        return set()
    key = ["prompt_id", "chain"]
    config = "sft" if run.facts.recipe.distill.objective == "sft" else "preference"
    files = sorted((run["dataset"] / config).glob("*.parquet"))
    tables = [pq.read_table(file, columns=key) for file in files if set(key) <= set(pq.read_schema(file).names)]
    return {(row["prompt_id"], row["chain"]) for table in tables for row in table.to_pylist()}


def _answers_by_prompt(run: Run, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the answers of the arms by prompt and sample; `prompt` is the prompt's id."""
    by_prompt: dict[tuple[str, int], dict[str, Answer]] = {}
    for answer in answers(run):
        by_prompt.setdefault((answer.prompt_id, answer.sample), {})[answer.arm] = answer
    sign = 1 if evaluation.scores["reward"].higher_is_better else -1
    arms_seen = {arm for arms in by_prompt.values() for arm in arms}
    thoughts = {arm: _thoughts_of_arm(run, arm) for arm in arms_seen}
    return [
        {
            "prompt": prompt_id,
            "sample": sample,
            "sign": sign,
            "arms": {
                arm: _answer_shown(answer, evaluation, thoughts[arm].get((prompt_id, sample), ""))
                for arm, answer in arms.items()
            },
        }
        for (prompt_id, sample), arms in sorted(by_prompt.items())
    ]


def _thoughts_of_arm(run: Run, arm: str) -> dict[AnswerKey, str]:
    """Return the thoughts of an arm of plain answers by prompt and sample; of another arm none: it has many turns."""
    if arm not in ARMS or ARMS[arm].way != "answer":
        return {}
    thoughts = thoughts_of(run, f"{ARMS[arm].prefix}turns.jsonl")
    return {(prompt_id, sample): t for (prompt_id, sample, step, role), t in thoughts.items() if role == "answer"}


def _answer_shown(answer: Answer, evaluation: Evaluation, thought: str) -> dict[str, Any]:
    return ({"thought": shorten(thought)} if thought else {}) | {
        "text": shorten(answer.text),
        "reward": answer.reward,
        "scores": {name: answer.score(name) for name in evaluation.score_names},
        "defect": answer.defect,
        "cut": answer.finish_reason == "length",
        "raw": shorten(answer.raw),
    }


def shorten(text: str) -> str:
    """Return at most LONGEST_TEXT characters of a text, with a note if it is longer, and no control characters."""
    text = clean(text)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} […] ({len(text):,} characters, cut here)"


def packed(texts: Mapping[str, Any]) -> str:
    """Return texts as gzipped JSON in base64; the same texts give the same bytes."""
    data = json.dumps(texts, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
