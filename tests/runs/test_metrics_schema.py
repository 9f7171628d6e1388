"""metrics.json is what its schema says: what stages make fits it, and what it doesn't know is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from dsc_hub import stats
from dsc_hub.chain.chain import NOT_COMPARABLE
from dsc_hub.cli.main import cli
from dsc_hub.config import recipe_files
from dsc_hub.config.sampling import ChainConfig
from dsc_hub.errors import RunError
from dsc_hub.evaluation import side_effects
from dsc_hub.evaluation.summary import summarise_evaluation
from dsc_hub.records import Chain, Prompt, Score, Step
from dsc_hub.report.page import build_page
from dsc_hub.runs.cost import cost_of
from dsc_hub.runs.metrics_schema import SCHEMA, Evaluation, Metrics, Sampling
from dsc_hub.runs.results import metrics_of
from dsc_hub.runs.run import Run
from dsc_hub.sampling import convergence, summary
from tests import fixture_run

PROMPTS = [Prompt(f"p{i}", f"Review Film{i // 2}.", f"Film{i // 2}", "test") for i in range(8)]


def test_the_whole_of_a_run_fits():
    assert Metrics.model_validate(fixture_run.metrics()).evaluation.arms["base"].reward.mean == -0.052


def test_what_the_schema_does_not_know_is_refused():
    numbers = fixture_run.metrics()
    numbers["evaluation"]["arms"]["base"]["rewrad"] = 1
    with pytest.raises(ValidationError, match="rewrad"):
        Metrics.model_validate(numbers)


def test_what_evaluation_makes_fits(recipe_file):
    r = recipe_files.load_recipe_file(recipe_file, ["evaluation.arms=[base, distilled]"])
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
    processors = {"base": 2, "distilled": None}
    made = summarise_evaluation(
        r, PROMPTS, fixture_run.typed(rows), {"reward": {}, "second": {}}, {"base": 1.0}, neutral, processors
    )
    rest = {
        key: fixture_run.metrics()["evaluation"][key]
        for key in ("processors", "neutral_texts", "neutral", "scores", "served_on")
    }
    rest["cost_usd"] = None  # by the recipe's prices, of all turns
    assert set(made) | set(rest) == set(Evaluation.model_fields)
    Evaluation.model_validate(json.loads(json.dumps(made | rest)))


def test_what_sampling_makes_fits(tmp_path: Path):
    chains = [
        Chain(p.id, k, "first", Score(0.0), "", (Step(1, "c", "r", Score(0.5), "", ""),))
        for p in PROMPTS
        for k in (0, 1)
    ]
    groups = {p.id: p.group for p in PROMPTS}
    chain = ChainConfig(critique="Criticise {answer}.", revision="Revise it.", chains_per_prompt=2)
    made = summary.chain_numbers(chains, groups.__getitem__, 17, chain)
    run = Run(tmp_path)
    run.rows("turns.jsonl").append({"prompt_tokens": 1, "new_tokens": 2})
    cost = cost_of(run, "sampling", "turns.jsonl") | {"reused_turns": 0}
    of_some_recipes = {"ended_by", "pairs"}  # which ask for rows or a budget, or have several texts
    assert set(made) | set(cost) == set(Sampling.model_fields) - of_some_recipes
    Sampling.model_validate(json.loads(json.dumps(made | cost)))
    several = chain.model_copy(update={"critique": ("Criticise {answer}.", "Who is hurt?")})
    pairs = summary.chain_numbers(chains, groups.__getitem__, 17, several)["pairs"]
    assert pairs == [{"proposals": len(chains), "accepted": len(chains)}, {"proposals": 0, "accepted": 0}]
    Sampling.model_validate(json.loads(json.dumps(made | cost | {"ended_by": "budget", "pairs": pairs})))


def old_numbers() -> dict:
    """What schema 3 wrote: a claim of booleans, sentences, a bootstrap beside the interval."""
    numbers = fixture_run.metrics()
    numbers["schema"] = 3
    evaluation = numbers["evaluation"]
    del evaluation["primary"]
    boot = {"low": 0.1, "high": 0.2, "method": "BCa"}
    for owner in (evaluation["arms"]["base"]["reward"], evaluation["differences"]["distilled - base"]["second"]):
        owner["bootstrap"] = boot
    evaluation["claim"] = {"holds": False, "answers": 40, "criteria": [
        {"name": "better on the reward", "holds": True, "told": "so", "base": None, "distilled": 0.3},
        {"name": "as long", "holds": False, "told": "twice as long", "base": 30.0, "distilled": 60.0},
        {"name": "names its subject", "holds": None, "told": "not known", "base": None, "distilled": None},
    ]}  # fmt: skip
    last = numbers["sampling"]["last_step"]
    del last["chains"]
    last["sentence"] = "one more step may pay"
    last["gain"]["bootstrap"] = boot
    del numbers["dataset"]["uncompared"], numbers["test_set"]["position"]
    return numbers


def test_numbers_of_the_schema_before_are_still_read(tmp_path: Path):
    run = fixture_run.write(tmp_path, run_metrics=old_numbers())
    metrics = metrics_of(run).model_dump(by_alias=True)  # checked against today's schema
    assert metrics["schema"] == SCHEMA
    # what meant something else is absent, not taken for what it means today
    assert all(
        s["reward_state"]["mean"] is None and "older dsc" in s["reward_state"]["reason"]
        for s in metrics["sampling"]["steps"]
    )
    claim = metrics["evaluation"]["claim"]
    # the scores are judged by interval and p; what was compared by bare counts is open, and so is whether it was the
    # first look
    verdicts = {c["name"]: c["verdict"] for c in claim["criteria"]}
    assert claim["verdict"] == "not enough data" and verdicts == {
        "better on the reward": "met",
        "better on the second scorer": "met",
        "as long": "undecided",
        "names its subject": "unmeasured",
        "first look at this test set": "undecided",
    }
    primary = metrics["evaluation"]["primary"]
    assert primary == {"difference": "distilled - base", "scores": ["reward", "second"]}
    p = {s: metrics["evaluation"]["differences"]["distilled - base"][s] for s in ("reward", "second")}
    assert p["reward"]["p_holm"] == 2 * p["reward"]["p"]  # of the two scores of the primary comparison alone
    for verb in (["check"], ["show"]):
        done = CliRunner().invoke(cli, [*verb, str(run.folder)])
        assert done.exit_code in (0, 1) and (done.exception is None or isinstance(done.exception, SystemExit)), (
            done.output
        )
    build_page(run)  # report and plots


def test_numbers_of_an_unknown_schema_are_refused(tmp_path: Path):
    for schema in (2, SCHEMA + 1):
        run = fixture_run.write(tmp_path / str(schema), run_metrics=fixture_run.metrics() | {"schema": schema})
        with pytest.raises(RunError, match=f"of schema {schema}"):
            metrics_of(run)


def test_rewards_by_step_are_of_clean_scored_texts(tmp_path: Path):
    """Of four chains one first answer is dirty and one unscored; a dirty revision with the highest reward counts
    nowhere."""

    def chain(
        i: int, first: float | None, revised: float | None, defect: str = "", of_revision: str = "", rejected: str = ""
    ) -> Chain:
        step = Step(1, "c", "r", Score(revised), of_revision, rejected or of_revision)
        return Chain(f"p{i}", 0, "first", Score(first), defect, (step,))

    chains = [
        chain(0, 0.2, 0.6),
        chain(1, 0.9, 0.4, defect="empty"),  # dirty, then its first clean state
        chain(2, None, 0.8, rejected=NOT_COMPARABLE),
        chain(3, 0.1, 0.99, of_revision="repeats itself"),
    ]
    made = summary.summary(chains, lambda i: i, 4, 1)
    last = convergence.last_step(chains, lambda i: i, 1)
    assert (made["first_reward"]["mean"], made["first_reward"]["n"]) == (pytest.approx(0.15), 2)
    step = made["steps"][0]
    assert (step["reward_proposed"]["mean"], step["reward_proposed"]["n"]) == (pytest.approx(0.6), 3)
    assert (step["reward_state"]["mean"], step["reward_state"]["n"]) == (pytest.approx((0.6 + 0.4 + 0.1) / 3), 3)
    assert made["usable"] == step["reward_state"]["n"] == last["gain"]["n"] + last["first_clean"]
    assert step["rejected"] == {NOT_COMPARABLE: 1, "repeats itself": 1}


def test_every_measure_is_described():
    assert set(side_effects.MEASURES) == set(fixture_run.metrics()["evaluation"]["side_effects"]["arms"]["base"])
    made = stats.paired_difference([1.0, 2.0], [0.0, 1.0], ["a", "b"])
    assert {"p", "p_t", "effect", "wins", "ties", "losses", "detectable"} < set(made)


def test_the_schema_can_be_printed():
    found = json.loads(CliRunner().invoke(cli, ["schema", "metrics"]).output)
    assert "evaluation" in found["properties"] and "nats a token" in json.dumps(found)
    assert "chain" in json.loads(CliRunner().invoke(cli, ["schema"]).output)["properties"]
