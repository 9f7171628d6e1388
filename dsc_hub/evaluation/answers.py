"""Collect the answers of the arms, score them and store them as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.chain import hygiene
from dsc_hub.chain.hygiene import REPEATED_3GRAMS
from dsc_hub.config.recipe import SCORERS, Recipe
from dsc_hub.evaluation import arms
from dsc_hub.records import Prompt, Score
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import LEDGER, looks_of
from dsc_hub.system.files import read_json, write_json
from dsc_hub.system.hashing import file_hash

Scorers = Mapping[str, Callable[[Sequence[str], Sequence[Prompt]], list[Score]]]
AnswerRow = dict[str, Any]
ANSWERS = pa.schema(
    [
        ("arm", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("raw", pa.string()),
        ("reward", pa.float64()),
        ("second", pa.float64()),
        ("third", pa.float64()),
        ("unscored_reason", pa.string()),
        ("finish_reason", pa.string()),
        ("new_tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("defect", pa.string()),
    ]
)


def collect_answers(run: Run, recipe: Recipe, prompts: Sequence[Prompt], scorers: Scorers) -> list[AnswerRow]:
    """Return one row per arm, prompt and sample: text, finish reason, token counts and scores (None with a reason).

    All arms are treated alike: if the recipe's hygiene strips openings about the task from the texts of a chain, it
    strips them from the answers of every arm, and `raw` holds the whole text ("" if nothing was stripped).
    """
    by_id = {p.id: p for p in prompts}
    # Use the repetition threshold with known error rates; stricter rules for training data belong to the chain.
    update = {"repeated": REPEATED_3GRAMS} | ({"meta_talk": "reject"} if recipe.hygiene.meta_talk == "keep" else {})
    rules = recipe.hygiene.model_copy(update=update)
    rows = []
    for arm in recipe.evaluation.arms:
        for a in arms.answers_of(run, recipe, arm, by_id, scorers["reward"]):
            prompt = by_id[a.prompt_id]
            inspection = hygiene.inspect(a.text, a.finish_reason, prompt, "", rules)
            rows.append(
                {
                    "arm": arm,
                    "prompt_id": a.prompt_id,
                    "sample": a.sample,
                    "group": prompt.group,
                    "prompt": prompt.text,
                    "text": inspection.text,
                    "raw": a.raw or inspection.raw,
                    "finish_reason": a.finish_reason,
                    "new_tokens": a.new_tokens,
                    "prompt_tokens": a.prompt_tokens,
                    "defect": inspection.defect,
                }
            )
    score_answers(rows, by_id, scorers)
    return rows


def score_answers(answers: list[AnswerRow], prompts: Mapping[str, Prompt], scorers: Scorers) -> None:
    """Add `reward`, `second`, `third` (None if unscored or without such a scorer) and `unscored_reason` to the rows."""
    answer_prompts = [prompts[a["prompt_id"]] for a in answers]
    for name in SCORERS:
        scores = (
            scorers[name]([a["text"] for a in answers], answer_prompts)
            if name in scorers
            else [Score(None, "no scorer")] * len(answers)
        )
        for answer, score in zip(answers, scores, strict=True):
            answer[name] = score.value
            if name == "reward":
                answer["unscored_reason"] = score.reason


def write_answers(run: Run, answers: list[AnswerRow], split: str) -> Path:
    """Write the answers as rows (for the report) and as Parquet (for the dataset repo); return the Parquet path."""
    rows = run.rows("evaluation/answers.jsonl")
    rows.path.unlink(missing_ok=True)
    for answer in answers:
        rows.append(answer)
    rows.close()
    path = run["dataset"] / "evaluation" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(answers, schema=ANSWERS), path)
    return path


def count_adapters(runs: Path, prompts: Sequence[Prompt], adapter: Path | None) -> dict[str, Any]:
    """Add this adapter to the ledger of the test set, which lies beside the runs.

    Return {id, adapters_scored: number of different adapters scored on the set so far, position: position of this
    adapter in scoring order (1: the first; None without an adapter, or if its position is unknown)}. The more adapters
    are tried on a test set, the less its best number means.
    """
    import fcntl
    import hashlib

    test_set = hashlib.sha256("\n".join(sorted(p.id for p in prompts)).encode()).hexdigest()[:12]
    ledger = runs / LEDGER
    with (runs / "test_sets.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries: dict[str, Any] = read_json(ledger) if ledger.is_file() else {}
        scored, unordered = looks_of(entries.get(test_set))
        adapter_hash = None if adapter is None else file_hash(adapter)
        if adapter_hash is not None and adapter_hash not in scored:
            scored = [*scored, adapter_hash]
        write_json(ledger, entries | {test_set: {"adapters": scored, "unordered": unordered}})
    position = None if adapter_hash is None else 1 + scored.index(adapter_hash)
    if position is not None and unordered > 1 and position <= unordered:
        position = None
    return {"id": test_set, "adapters_scored": len(scored), "position": position}
