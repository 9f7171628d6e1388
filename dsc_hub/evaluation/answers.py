"""Collect the answers of the arms, score them and store them as rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.chain import hygiene
from dsc_hub.chain.hygiene import REPEATED_3GRAMS
from dsc_hub.config.recipe import Recipe
from dsc_hub.evaluation import arms
from dsc_hub.records import Answer, Prompt, Score
from dsc_hub.runs.run import Run
from dsc_hub.runs.test_sets import LEDGER, scored_adapters, set_id
from dsc_hub.system.files import read_json, write_json
from dsc_hub.system.hashing import file_hash
from dsc_hub.system.locks import locked

Scorers = Mapping[str, Callable[[Sequence[str], Sequence[Prompt]], list[Score]]]
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
        ("second_unscored_reason", pa.string()),
        ("third_unscored_reason", pa.string()),
        ("finish_reason", pa.string()),
        ("new_tokens", pa.int64()),
        ("prompt_tokens", pa.int64()),
        ("defect", pa.string()),
    ]
)


def collect_answers(run: Run, recipe: Recipe, prompts: Sequence[Prompt], scorers: Scorers) -> list[Answer]:
    """Return one row per arm, prompt and sample: text, finish reason, token counts and scores (None with a reason).

    All arms are treated alike: if the recipe's hygiene strips openings about the task from the texts of a chain, it
    strips them from the answers of every arm, and `raw` holds the whole text ("" if nothing was stripped).
    """
    by_id = {p.id: p for p in prompts}
    # Use the repetition threshold with known error rates; stricter rules for training data belong to the chain.
    update = {"repeated": REPEATED_3GRAMS} | ({"meta_talk": "reject"} if recipe.hygiene.meta_talk == "keep" else {})
    rules = recipe.hygiene.model_copy(update=update)
    rows: list[Answer] = []
    for arm in recipe.evaluation.arms:
        for a in arms.answers_of(run, recipe, arm, by_id, scorers["reward"]):
            prompt = by_id[a.prompt_id]
            inspection = hygiene.inspect(a.text, a.finish_reason, prompt, "", rules)
            rows.append(
                Answer(
                    arm=arm,
                    prompt_id=a.prompt_id,
                    sample=a.sample,
                    group=prompt.group,
                    prompt=prompt.transcript,
                    text=inspection.text,
                    finish_reason=a.finish_reason,
                    new_tokens=a.new_tokens,
                    prompt_tokens=a.prompt_tokens,
                    defect=inspection.defect,
                    raw=a.raw or inspection.raw,
                )
            )
    return score_answers(rows, by_id, scorers)


def score_answers(answers: Sequence[Answer], prompts: Mapping[str, Prompt], scorers: Scorers) -> list[Answer]:
    """Return the answers with the scores of all `scorers`, and the reason of each score that is missing."""
    texts, answer_prompts = [a.text for a in answers], [prompts[a.prompt_id] for a in answers]
    out = list(answers)
    for name, score in scorers.items():
        out = [a.scored(name, s) for a, s in zip(out, score(texts, answer_prompts), strict=True)]
    return out


def write_answers(run: Run, answers: Sequence[Answer], split: str) -> Path:
    """Write the answers as rows (for the report) and as Parquet (for the dataset repo); return the Parquet path."""
    rows = run.rows("evaluation/answers.jsonl")
    rows.path.unlink(missing_ok=True)
    for answer in answers:
        rows.append(answer)
    rows.close()
    path = run["dataset"] / "evaluation" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([asdict(a) for a in answers], schema=ANSWERS), path)
    return path


def count_adapters(runs: Path, prompts: Sequence[Prompt], adapter: Path | None) -> dict[str, Any]:
    """Add this adapter to the ledger of the test set, which lies beside the runs.

    Return {id, adapters_scored: number of different adapters scored on the set so far, position: position of this
    adapter in scoring order (1: the first; None without an adapter, or if its position is unknown)}. The more adapters
    are tried on a test set, the less its best number means.
    """
    test_set = set_id(p.id for p in prompts)
    ledger = runs / LEDGER
    with locked(runs / "test_sets.lock"):
        entries: dict[str, Any] = read_json(ledger) if ledger.is_file() else {}
        scored, unordered = scored_adapters(entries.get(test_set))
        adapter_hash = None if adapter is None else file_hash(adapter)
        if adapter_hash is not None and adapter_hash not in scored:
            scored = [*scored, adapter_hash]
        write_json(ledger, entries | {test_set: {"adapters": scored, "unordered": unordered}})
    position = None if adapter_hash is None else 1 + scored.index(adapter_hash)
    if position is not None and unordered > 1 and position <= unordered:
        position = None
    return {"id": test_set, "adapters_scored": len(scored), "position": position}
