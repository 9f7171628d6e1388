"""A number of rows and a budget, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from dsc_hub.sampling import schedule

PAIRS = "chain.critique=['What is wrong with it?', 'Who is hurt by it?']"


def test_exactly_so_many_rows_are_written_and_more_are_a_run_that_takes_over(dsc, recipe_file: Path, server: str):
    at = [str(recipe_file), f"serving.endpoints=[{server}]", "chain.chains_per_prompt=30", PAIRS]
    done = dsc("sample", *at, "dataset.rows=3", code=0)
    assert "with the 3 training rows that are wanted" in done.stderr, done.stderr
    dsc("dataset", *at, "dataset.rows=3", code=0)
    (run,) = (dsc.work / "runs" / "little").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["dataset"]["sft"]["train"] == 3 and metrics["sampling"]["ended_by"] == "rows"
    assert metrics["sampling"]["chains"] == metrics["sampling"]["finished"] < 14 * 30
    assert "done before" in dsc("sample", *at, "dataset.rows=3", code=0).stderr
    more = dsc("sample", *at, "dataset.rows=6", code=0)
    assert "turns of other runs with this model and these settings are at hand" in more.stderr
    assert "with the 6 training rows that are wanted" in more.stderr


def test_a_budget_that_is_too_small_says_what_to_raise(dsc, recipe_file: Path, server: str):
    at = [
        str(recipe_file),
        f"serving.endpoints=[{server}]",
        "chain.chains_per_prompt=30",
    ]
    done = dsc("sample", *at, "dataset.rows=200", "budget.tokens=10000", code=0)
    assert "with its budget of 10,000 tokens, before it had the 200 training rows that are wanted; raise budget" in (
        " ".join(done.stderr.split())
    )
    (run,) = (dsc.work / "runs" / "little").iterdir()
    assert 5000 < json.loads((run / "metrics.json").read_text())["sampling"]["new_tokens"] <= 10000


def test_too_few_chains_say_what_to_raise(dsc, recipe_file: Path, server: str):
    at = [str(recipe_file), f"serving.endpoints=[{server}]", "dataset.rows=10", "dataset.min_reward=0.9"]
    done = dsc("sample", *at, code=0)
    assert "Raise chain.chains_per_prompt, add prompts, or loosen" in " ".join(done.stderr.split())


def test_a_pair_of_texts_that_the_recipe_lacks_is_said(dsc, recipe_file: Path, server: str):
    at = [str(recipe_file), f"serving.endpoints=[{server}]", "chain.chains_per_prompt=30", "dataset.rows=3"]
    dsc("sample", *at, code=0)
    (run,) = (dsc.work / "runs" / "little").iterdir()
    text = (run / "chains.jsonl").read_text()
    (run / "chains.jsonl").write_text(text.replace('"rejected"', '"pair":99,"rejected"', 1))
    (run / "sampling.done.json").unlink()
    done = dsc("sample", *at, code=2)
    assert "has the pair of texts 99, and the recipe has 1" in " ".join(done.stderr.split())


def test_the_plan_says_the_most_and_a_shard_is_refused(dsc, recipe_file: Path, server: str):
    at = [str(recipe_file), f"serving.endpoints=[{server}]", "dataset.rows=3"]
    plan = dsc("plan", *at, code=0).stdout
    assert "at most 14 of 2 step(s)" in plan and "at most 70 requests" in plan and "3 training rows" in plan
    done = dsc("plan", *at[:2], "dataset.rows=300", "chain.good_enough=1.5", code=2)
    assert "300 are wanted, and" in " ".join(done.stderr.split()) and "above what the reward can reach" in done.stderr
    done = dsc("sample", *at, "--shard", "1/2", code=2)
    assert "a shard doesn't know what the others have sampled" in done.stderr and schedule.ROWS == "rows"


def test_a_row_of_another_run_is_noticed(dsc, recipe_file: Path, server: str):
    at = [str(recipe_file), f"serving.endpoints=[{server}]", "chain.chains_per_prompt=30", "dataset.rows=3"]
    dsc("sample", *at, code=0)
    (run,) = (dsc.work / "runs" / "little").iterdir()
    lines = (run / "chains.jsonl").read_text().splitlines(keepends=True)
    foreign = json.loads(lines[0]) | {"prompt_id": "0123456789abcdef"}
    (run / "chains.jsonl").write_text("".join([*lines, json.dumps(foreign) + "\n"]))
    (run / "sampling.done.json").unlink()
    assert "holds a chain of 0123456789abcdef" in dsc("sample", *at, code=2).stderr
