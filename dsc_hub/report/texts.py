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

from dsc_hub.records import Answer, Chain, Prompt, Score
from dsc_hub.runs.metrics_schema import Evaluation
from dsc_hub.runs.results import answers
from dsc_hub.runs.run import Run

LONGEST_TEXT = 4000  # characters of one text; a model that never stops must not fill the page
MOST_CHAINS = 20_000  # on one page
NO_TEXTS: dict[str, Any] = {"prompts": [], "chains": [], "answers": []}


def texts_of(run: Run, evaluation: Evaluation | None, first_chain: int = 0) -> dict[str, Any]:
    """Return {prompts, chains, answers} of a run.

    `prompts` are {id, text, group, split, kind}; chains and answers name theirs by its place. A chain is {prompt,
    chain, row, answer, steps}, with `row` where it gave a training row; at most MOST_CHAINS from `first_chain` on, in
    the order of their prompts. Answers are {prompt, sample, sign, arms}, where `sign` is -1 if less is better.
    """
    prompts = {p.id: p for p in run.rows("prompts.jsonl").as_type(Prompt)}
    shown: dict[str, int] = {}

    def place(prompt_id: str) -> int:
        return shown.setdefault(prompt_id, len(shown))

    rows = _training_rows(run)
    chains = sorted(run.rows("chains.jsonl").as_type(Chain), key=lambda c: c.key)
    chain_rows = [
        {
            "prompt": place(c.prompt_id),
            "chain": c.number,
            "row": c.key in rows,
            "answer": _text(c.answer, c.answer_score, c.answer_defect, c.answer_raw),
            "steps": [
                _text(s.revision, s.score, s.defect, s.raw) | {"critique": shorten(s.critique), "rejected": s.rejected}
                for s in c.steps
            ],
        }
        for c in chains[first_chain : first_chain + MOST_CHAINS]
    ]
    answer_rows = _answers(run, evaluation, place) if evaluation and not first_chain else []
    known = [prompts.get(i) or Prompt(i, "(the prompt is not in prompts.jsonl)", "", "test") for i in shown]
    return {
        "prompts": [
            {"id": p.id, "text": shorten(p.text), "group": p.group, "split": p.split, "kind": p.kind} for p in known
        ],
        "chains": chain_rows,
        "answers": answer_rows,
    }


def _text(text: str, score: Score, defect: str, raw: str) -> dict[str, Any]:
    out: dict[str, Any] = {"text": shorten(text), "reward": score.value}
    optional = {"defect": defect, "unscored": score.reason, "raw": shorten(raw)}
    return out | {key: value for key, value in optional.items() if value}


def _training_rows(run: Run) -> set[tuple[str, int]]:
    """Return the chains that gave a training or validation row; none before the stage dataset."""
    key = ["prompt_id", "chain"]
    files = sorted((run["dataset"] / "sft").glob("*.parquet"))
    tables = [pq.read_table(file, columns=key) for file in files if set(key) <= set(pq.read_schema(file).names)]
    return {(row["prompt_id"], row["chain"]) for table in tables for row in table.to_pylist()}


def _answers(run: Run, evaluation: Evaluation, place: Any) -> list[dict[str, Any]]:
    by_prompt: dict[tuple[str, int], dict[str, Answer]] = {}
    for answer in answers(run):
        by_prompt.setdefault((answer.prompt_id, answer.sample), {})[answer.arm] = answer
    sign = 1 if evaluation.scores["reward"].higher_is_better else -1
    return [
        {
            "prompt": place(prompt_id),
            "sample": sample,
            "sign": sign,
            "arms": {arm: _answer(answer, evaluation) for arm, answer in arms.items()},
        }
        for (prompt_id, sample), arms in sorted(by_prompt.items())
    ]


def _answer(answer: Answer, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "text": shorten(answer.text),
        "reward": answer.reward,
        "scores": {name: answer.score(name) for name in evaluation.score_names},
        "defect": answer.defect,
        "cut": answer.finish_reason == "length",
        "raw": shorten(answer.raw),
    }


def shorten(text: str) -> str:
    """Return at most LONGEST_TEXT characters of a text, with a note if it is longer."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} […] ({len(text):,} characters, cut here)"


def packed(texts: Mapping[str, Any]) -> str:
    """Return texts as gzipped JSON in base64; the same texts give the same bytes."""
    data = json.dumps(texts, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(data, mtime=0)).decode()
