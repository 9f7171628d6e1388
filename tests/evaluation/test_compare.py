"""Runs beside each other: paired where prompts agree, never where they don't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dsc_hub.cli.main import cli
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.evaluation.compare import compare_runs
from dsc_hub.runs.run import Run
from tests import fixture_run


def run_with(folder: Path, shift: float = 0.0, **changes: Any) -> Run:
    rows = [
        row | {"reward": None if row["reward"] is None else row["reward"] + shift} | changes
        for row in fixture_run._answers(fixture_run.PROMPTS)
    ]
    run = fixture_run.write(folder, answers=rows)
    run.finish("evaluation", "f", 1.0, {})
    return run


def test_the_same_arm_is_compared_pair_by_pair(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), run_with(tmp_path / "two", shift=0.25)
    found = compare_runs([one, two])
    assert [d.arm for d in found.differences] == ["base", "self_critique", "distilled"]
    distilled = found.differences[2]
    assert (distilled.prompts, distilled.unshared) == (10, 0)
    vader = distilled.by_score["sentiment (vader)"]
    assert vader.mean == pytest.approx(0.25) and (vader.n, vader.groups, vader.wins) == (10, 10, 10)
    assert distilled.by_score["sentiment (textblob)"].mean == 0
    assert found.differences[0].by_score["sentiment (vader)"].n == 9  # one answer of base is unscored
    family = [e for d in found.differences for e in d.by_score.values()]
    assert len(family) == 6 and all(e.p_holm >= e.p for e in family)


def test_other_prompts_are_not_subtracted(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), run_with(tmp_path / "two", shift=0.25, prompt_id="elsewhere")
    d = compare_runs([one, two]).differences[0]
    assert d.prompts == 0 and d.unshared == 11 and d.by_score["sentiment (vader)"].mean is None


def test_scores_are_matched_by_their_scorer_not_by_their_part(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), run_with(tmp_path / "two")
    numbers = two.metrics["evaluation"]
    scores = numbers["scores"]
    two.add_metrics("evaluation", numbers | {"scores": {"reward": scores["second"], "second": scores["reward"]}})
    facts = two.raw_facts
    identity = facts["identity"]
    swapped = {"reward": identity["second_scorer"], "second_scorer": identity["reward"]}
    two.add_facts(identity=identity | swapped)
    d = compare_runs([one, two]).differences[2]
    # two's reward column is now called textblob: 0.48 - 0.05 i against textblob's 0.29 of one
    assert d.by_score["sentiment (textblob)"].mean == pytest.approx(0.48 - 0.225 - 0.29)


def test_two_scorers_of_one_name_are_not_taken_for_one(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), run_with(tmp_path / "two")
    two.add_facts(identity=two.raw_facts["identity"] | {"reward": "sentiment/b/roberta@c0ffee"})
    assert set(compare_runs([one, two]).differences[0].by_score) == {"sentiment (textblob)"}


@pytest.mark.parametrize(
    "reward", [{"weight": 2.0}, {"plus": [{"metric": "sentiment", "scorer": "textblob", "weight": 0.5}]}]
)
def test_sums_and_weights_make_another_score(tmp_path: Path, reward: dict):
    one, two, three = (run_with(tmp_path / n) for n in ("one", "two", "three"))
    for run in (two, three):
        recipe = run.raw_facts["recipe"]
        run.add_facts(recipe=recipe | {"reward": recipe["reward"] | reward})
    assert set(compare_runs([one, two]).differences[0].by_score) == {"sentiment (textblob)"}
    assert len(compare_runs([two, three]).differences[0].by_score) == 2


def test_arms_on_other_weights_or_at_another_temperature_are_told(tmp_path: Path):
    one, two, three = (run_with(tmp_path / n / "r" / "f") for n in ("one", "two", "three"))
    assert compare_runs([one, two]).notes == []
    two.add_metrics("evaluation", two.metrics["evaluation"] | {"served_on": "other weights"})
    three.raw_facts["recipe"]["evaluation"]["temperature"] = 0.1
    recipe = three.raw_facts["recipe"]
    three.add_facts(recipe=recipe | {"evaluation": recipe["evaluation"] | {"temperature": 0.1}})
    found = compare_runs([one, two, three])  # all called r/f: their paths tell them apart
    assert len({r.name for r in found.runs}) == 3
    assert [("ran on" in n, "temperature" in n) for n in found.notes] == [(True, False), (False, True)]


def of_seed(folder: Path, seed: int, mean: float, **more: Any) -> Run:
    run = run_with(folder)
    recipe = run.raw_facts["recipe"]
    run.add_facts(recipe=recipe | {"distill": recipe["distill"] | {"seed": seed}} | more)
    numbers = run.metrics["evaluation"]
    numbers["arms"]["distilled"]["reward"]["mean"] = mean
    run.add_metrics("evaluation", numbers)
    return run


def test_the_spread_between_trainings_is_over_runs_that_differ_in_their_seed_only(tmp_path: Path):
    runs = [of_seed(tmp_path / str(seed), seed, mean) for seed, mean in ((1, 0.2), (2, 0.3), (3, 0.7))]
    spread = {s.score: s for s in compare_runs(runs).spread if s.arm == "distilled"}
    reward = spread["sentiment (vader)"]
    assert (reward.runs, reward.low, reward.high) == (3, 0.2, 0.7)
    assert reward.mean == pytest.approx(0.4) and reward.sd == pytest.approx(0.2645751)  # sqrt(0.07)
    assert spread["sentiment (textblob)"].sd == 0
    assert {s.arm for s in compare_runs(runs).spread} == {"distilled"}  # the base does not depend on the training
    told = CliRunner().invoke(cli, ["compare", *(str(run.folder) for run in runs)])
    assert told.exit_code == 0, told.exception

    other = of_seed(tmp_path / "other", 4, 0.5, generation={"temperature": 0.3})
    assert compare_runs([*runs, other]).spread == []
    same_seed = of_seed(tmp_path / "same", 1, 0.5)
    assert compare_runs([*runs, same_seed]).spread == []


def test_one_run_or_an_unfinished_one_is_refused(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), fixture_run.write(tmp_path / "two")
    with pytest.raises(ConfigError, match="two or more different runs"):
        compare_runs([one, one])
    two.unfinish("evaluation")
    with pytest.raises(RunError, match="is not evaluated"):
        compare_runs([one, two])


def test_the_verbs_print_tables_and_json(tmp_path: Path):
    one, two = run_with(tmp_path / "one"), run_with(tmp_path / "two", shift=0.25)
    told = CliRunner().invoke(cli, ["compare", str(one.folder), str(two.folder)])
    assert told.exit_code == 0, told.exception
    found = json.loads(CliRunner().invoke(cli, ["compare", "--json", str(one.folder), str(two.folder)]).output)
    assert found["differences"][2]["by_score"]["sentiment (vader)"]["mean"] == pytest.approx(0.25)
    shown = json.loads(CliRunner().invoke(cli, ["show", "--json", str(one.folder)]).output)
    assert shown == one.metrics
    one.unfinish("evaluation")
    refused = CliRunner().invoke(cli, ["show", "--json", str(one.folder)])
    assert isinstance(refused.exception, RunError) and refused.output == ""
    one.finish("evaluation", "f", 1.0, {})
    claim = CliRunner().invoke(cli, ["check", "--json", str(one.folder)])
    assert claim.exit_code == 1 and json.loads(claim.output)["verdict"] == "fails"


def test_show_tells_all_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import io

    from rich.console import Console

    from dsc_hub.cli import screens, terminal

    text = io.StringIO()
    monkeypatch.setattr(terminal, "out", Console(file=text, width=200, highlight=False))
    screens.numbers(run_with(tmp_path / "one"))
    said = text.getvalue()
    for words in (
        "what else moved",
        "surprise at neutral text",
        "what it cost",
        "core hours",
        "not estimable (the rule is 'improve'",
        "changed the reward of the 225 chains that were clean before it by 0.23",
    ):
        assert words in said, words
