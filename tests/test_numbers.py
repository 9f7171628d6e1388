"""metrics.json is what its schema says: what stages make fits it, and what it doesn't know is refused."""

from __future__ import annotations

import json
from pathlib import Path

import fixture_run
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from dsc_hub import diagnostics, evaluation, recipe_files, sampling, side_effects, stats
from dsc_hub.cli import cli
from dsc_hub.numbers import Evaluation, Metrics, Sampling
from dsc_hub.records import Chain, Prompt, Score, Step
from dsc_hub.runs import Run

PROMPTS = [Prompt(f"p{i}", f"Review Film{i // 2}.", f"Film{i // 2}", "test") for i in range(8)]


def test_the_whole_of_a_run_fits():
    assert Metrics.model_validate(fixture_run.metrics()).evaluation.arms["base"].reward.mean == -0.052


def test_what_the_schema_does_not_know_is_refused():
    numbers = fixture_run.metrics()
    numbers["evaluation"]["arms"]["base"]["rewrad"] = 1
    with pytest.raises(ValidationError, match="rewrad"):
        Metrics.model_validate(numbers)


def test_what_evaluation_makes_fits(recipe_file):
    r = recipe_files.load(recipe_file, ["evaluation.arms=[base, distilled]"])
    rows = [
        {"arm": arm, "prompt_id": p.id, "sample": 0, "group": p.group, "prompt": p.text, "text": f"{arm} says {p.id}."}
        | {
            "finish_reason": "stop",
            "new_tokens": 5,
            "prompt_tokens": 9,
            "defect": "",
            "reward": 0.1 * i,
            "second": None,
        }
        for arm in ("base", "distilled")
        for i, p in enumerate(PROMPTS)
    ]
    neutral = {"base": {"text": 2.0, "other": 2.5}}
    made = evaluation.summarise(r, PROMPTS, rows, {"reward": True, "second": True}, {"base": 1.0}, neutral, 2)
    rest = {
        key: fixture_run.metrics()["evaluation"][key]
        for key in ("processors", "neutral_texts", "neutral", "scores", "served_on")
    }
    assert set(made) | set(rest) == set(Evaluation.model_fields)
    Evaluation.model_validate(json.loads(json.dumps(made | rest)))


def test_what_sampling_makes_fits(tmp_path: Path):
    chains = [
        Chain(p.id, k, "first", Score(0.0), "", (Step(1, "c", "r", Score(0.5), "", ""),))
        for p in PROMPTS
        for k in (0, 1)
    ]
    groups = {p.id: p.group for p in PROMPTS}
    made = sampling.summary(chains, groups.__getitem__, 17, 1) | {
        "mixing": diagnostics.mixing(chains, "improve", 1, 2),
        "last_step": diagnostics.last_step(chains, groups.__getitem__, 1),
    }
    run = Run(tmp_path)
    run.rows("turns.jsonl").append({"prompt_tokens": 1, "new_tokens": 2})
    cost = run.cost("sampling", "turns.jsonl") | {"reused_turns": 0}
    assert set(made) | set(cost) == set(Sampling.model_fields)
    Sampling.model_validate(json.loads(json.dumps(made | cost)))


def test_every_measure_is_described():
    assert set(side_effects.MEASURES) == set(fixture_run.metrics()["evaluation"]["side_effects"]["arms"]["base"])
    made = stats.paired_difference([1.0, 2.0], [0.0, 1.0], ["a", "b"])
    assert {"p", "p_t", "effect", "wins", "ties", "losses", "detectable"} < set(made)


def test_the_schema_can_be_printed():
    found = json.loads(CliRunner().invoke(cli, ["schema", "metrics"]).output)
    assert "evaluation" in found["properties"] and "nats a token" in json.dumps(found)
    assert "chain" in json.loads(CliRunner().invoke(cli, ["schema"]).output)["properties"]
