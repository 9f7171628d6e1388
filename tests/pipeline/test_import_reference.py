"""Result rows of the reference implementation become chains, and the other stages go on from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsc_hub.errors import DscError
from dsc_hub.pipeline import import_reference
from dsc_hub.records import Chain
from dsc_hub.runs.run import Run
from tests.conftest import ROOT


def row(i: int, before: float | None = 1.0, after: float | None = 4.0, **other: object) -> dict[str, object]:
    return {
        "prompt": f"Review the film about harbour number {i}.",
        "summary_pre": f"Harbour {i} is a dull and clumsy film.",
        "summary_after": f"Harbour {i} is a calm film, and its last act is lovely.",
        "scores_pre": before,
        "scores_after": after,
    } | other


ROWS = [
    *(row(i) for i in range(16)),
    row(16, before=3.0, after=3.0),  # not better
    row(17, before=3.0, after=2.0),
    row(18, after=None),  # unscored
    row(0, after=5.0),  # the same prompt once more
    row(19, summary_after=""),  # nothing in it, whatever it scores
]


def dsc(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "dsc_hub", *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_rows_become_chains_and_the_dataset_is_made_of_them(file: Path, tmp_path: Path, recipe_file: Path):
    words = [
        "import-reference",
        str(file),
        str(recipe_file),
        "prompts.split={train: 0.7, validation: 0.15, test: 0.15}",
    ]
    done = dsc(tmp_path, *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["better"]) == (21, 18) and "21 rows, 18 strictly better" in done.stderr
    run = Run(tmp_path / found["run"])
    prompts = {p["id"]: p for p in run.rows("prompts.jsonl")}
    held_out = {p["text"] for p in prompts.values() if p["split"] == "test"}
    chains = list(run.rows("chains.jsonl").as_type(Chain))
    expected = [r for r in ROWS if r["prompt"] not in held_out]
    assert len(chains) == found["chains"] == len(expected) and found["held_out"] == len(ROWS) - len(expected)
    for chain in chains:
        (step,) = chain.steps
        texts = [r for r in ROWS if r["prompt"] == prompts[chain.prompt_id]["text"]]
        mine = texts[chain.number]
        assert (chain.answer, step.revision, step.critique) == (mine["summary_pre"], mine["summary_after"], "")
        assert (chain.answer_score.value, step.score.value) == (mine["scores_pre"], mine["scores_after"])
        better = mine["scores_after"] is not None and mine["scores_after"] > mine["scores_pre"]
        assert step.accepted is (better and bool(mine["summary_after"]))
    assert run.metrics["sampling"]["new_tokens"] is None and run.raw_facts["imported"]["rows"] == 21
    made = dsc(tmp_path, "dataset", str(tmp_path / "results" / "recipe.yaml"), "--json")
    assert made.returncode == 0, made.stderr
    rows = pq.read_table(run["dataset"] / "sft" / "train-00000-of-00001.parquet").to_pylist()
    kept = [c for c in chains if c.steps[0].accepted and prompts[c.prompt_id]["split"] == "train"]
    assert {r["completion"][0]["content"] for r in rows} == {c.steps[0].revision for c in kept} and rows
    again = dsc(tmp_path, *words)
    assert again.returncode == 2 and "results exists" in again.stderr and "--to" in again.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not JSON"),
        ("{}", "expected a list of result rows, got an object"),
        ("[]", "got an empty list"),
        ('["x"]', "row 1: expected an object, got a text"),
        (json.dumps([row(0), {"prompt": "x"}]), "row 2: no summary_pre, summary_after, scores_pre, scores_after"),
        (json.dumps([row(0, scores_pre="4")]), "scores_pre should be a number or null, got '4'"),
        (json.dumps([row(0, scores_pre=True)]), "scores_pre should be a number or null, got True"),
        (json.dumps([row(0, scores_after=[1, 2])]), "scores_after should be a number or null, got [1, 2]"),
        (json.dumps([row(0, scores_after=float("nan"))]), "scores_after is nan"),
        (json.dumps([row(0, summary_pre=None)]), "summary_pre should be text, got NoneType"),
        (json.dumps([row(0, prompt=" ")]), "prompt is empty"),
        (json.dumps([{}] * 30), "30 of 30 rows can't be read"),
    ],
)
def test_what_are_no_result_rows_is_told_row_by_row(tmp_path: Path, text: str, told: str):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DscError) as e:
        import_reference.read_result_rows(tmp_path / "rows.json")
    assert told in str(e.value)
    if "30 of" in told:
        assert "and 10 more" in str(e.value)


def test_a_list_of_one_number_is_that_number(tmp_path: Path):
    (tmp_path / "rows.json").write_text(json.dumps([row(0, before=[1], after=[2.5])]))
    (found,) = import_reference.read_result_rows(tmp_path / "rows.json")
    assert found.rewards == (1.0, 2.5) and found.is_better
