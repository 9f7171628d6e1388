"""What a stage may take, by what was measured on this machine: a range, and no single speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsc_hub.config.recipe_files import load_recipe_file
from dsc_hub.pipeline import pace
from dsc_hub.pipeline.pace import Pace, expect
from dsc_hub.system import cache

QUIET = Pace("sampling", 2560, 512, 147_578, 253.0, 98.0)  # 583 tokens/s with 128 in flight
BUSY = Pace("sampling", 2560, 512, 147_578, 10_541.0, 240.0)  # 14 tokens/s beside other work


def test_the_same_task_is_expected_as_it_was_measured():
    """Its lengths are known: 58 tokens a turn, and not up to 128."""
    same = [replace(QUIET, task="t", generating_s=s) for s in (253.0, 260.0, 248.0)]
    found = expect(same, "sampling", 2560, 512, 128, 1, "t")
    assert found.low < 253 + 98 < found.high and found.high / found.low < 1.25
    other = expect(same, "sampling", 2560, 512, 128, 1, "another")
    assert other.high / other.low > 1.8  # of another task they could be of full length
    long = replace(QUIET, task="u", new_tokens=2560 * 120, generating_s=500.0)
    assert expect([*same, long], "sampling", 2560, 512, 128, 1, "t") == found  # another task's speed and lengths
    assert expect([long], "sampling", 2560, 512, 128, 1, "u").high <= 2560 * 128 / long.tokens_per_s + 98


def test_likely_tokens_are_of_lengths_that_were_measured():
    """Whether compiling pays was decided from texts of full length: 327,680 tokens for a run that wrote 147,578."""
    assert pace.likely_tokens([], 2560, 128, "t") == 2560 * 64
    assert pace.likely_tokens([QUIET], 2560, 128, "t") == 147_578
    long = replace(QUIET, task="t", new_tokens=2560 * 100)
    assert pace.likely_tokens([long, QUIET], 2560, 128, "t") == 2560 * 100
    assert pace.likely_tokens([long], 2560, 64, "t") == 2560 * 64  # no longer than the limit
    evaluated = replace(QUIET, stage="evaluation", new_tokens=2560)
    assert pace.likely_tokens([evaluated], 10, 128, "t") == 640


def test_measurements_with_about_as_many_requests_in_flight_count():
    few = Pace("sampling", 140, 28, 8064, 60.0, 20.0)  # 134 tokens/s
    assert expect([QUIET, few], "sampling", 140, 28, 128, 1) == expect([few], "sampling", 140, 28, 128, 1)
    assert expect([QUIET, few], "sampling", 2560, 512, 128, 1) == expect([QUIET], "sampling", 2560, 512, 128, 1)
    assert expect([QUIET, few], "sampling", 160, 32, 128, 1).fast == pytest.approx(few.tokens_per_s * 32 / 28)


def test_one_fast_measurement_among_many_is_not_typical():
    lucky = replace(QUIET, generating_s=100.0)
    assert expect([*[QUIET] * 3, lucky], "sampling", 2560, 512, 128, 1).fast == QUIET.tokens_per_s
    assert expect([QUIET, lucky], "sampling", 2560, 512, 128, 1).fast == lucky.tokens_per_s


def test_what_changes_lengths_changes_the_task(recipe_file: Path):
    def task(*overrides: str, stage: str = "sampling", prompts: str = "p") -> str:
        return pace.task_of(load_recipe_file(recipe_file, overrides), prompts, stage)

    alike = ["chain.acceptance=always", "seed=3", "chain.chains_per_prompt=4", "distill.lora.r=4"]
    assert {task(o) for o in alike} == {task()}
    others = ["chain.steps=1", "chain.critique=Why?", "generation.temperature=1", "generation.max_new_tokens=64"]
    assert len({task(), task(prompts="q"), task(stage="evaluation"), *(task(o) for o in others)}) == 7
    arms = "evaluation.arms=[base]"
    assert task(arms) == task() and task(arms, stage="evaluation") != task(stage="evaluation")


def test_few_requests_do_not_reach_the_full_speed_and_the_start_counts():
    """28 chains of five turns took minutes where 12 s were promised."""
    found = expect([QUIET], "sampling", 140, 28, 128, 1)
    assert found.low == pytest.approx(140 * 147_578 / 2560 / 583.3 + 98, rel=0.01)
    assert found.high == pytest.approx(140 * 128 / (583.3 * 28 / 128) + 98, rel=0.01)
    assert found.high > 200


def test_a_run_beside_other_work_does_not_replace_good_measurements():
    quiet = expect([QUIET] * 3, "sampling", 2560, 512, 128, 1)
    after = expect([*[QUIET] * 3, BUSY], "sampling", 2560, 512, 128, 1)
    assert after.fast == quiet.fast and after.slow == quiet.slow and after.high < 2 * quiet.high
    assert expect([BUSY], "sampling", 2560, 512, 128, 1).low > 10_000  # where it is all that is known, it is said


def test_what_took_so_long_lies_in_the_range_of_what_was_measured():
    found = expect([QUIET], "sampling", QUIET.requests, QUIET.at_once, 128, 1)
    assert found.low <= QUIET.generating_s + QUIET.other_s <= found.high


def test_an_evaluation_that_was_never_measured_has_a_wide_range_with_all_its_starts():
    base = expect([QUIET], "evaluation", 960, 160, 128, 2)
    found = expect([QUIET], "evaluation", 960, 160, 128, 2, has_adapter=True)
    assert found.low > 2 * 98 and found.high > 960 * 128 / 583.3 * 2
    assert base.low == found.low and found.slow == base.slow / 2
    own = Pace("evaluation", 960, 160, 50_000, 120.0, 70.0)
    assert expect([QUIET, own], "evaluation", 960, 160, 128, 2, has_adapter=True).high < found.high


def test_without_a_measurement_or_without_requests_there_is_none():
    assert expect([], "sampling", 10, 10, 128, 1) is None and expect([QUIET], "sampling", 0, 10, 128, 1) is None


def test_the_last_eight_of_each_stage_are_kept_and_few_tokens_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    pace.remember_pace("m", Pace("evaluation", 10, 10, 2000, 4.0, 1.0))
    for i in range(12):
        pace.remember_pace("m", Pace("sampling", 10, 10, 2000 + i, 4.0, 1.0))
    pace.remember_pace("m", Pace("sampling", 10, 10, 900, 4.0, 1.0))
    kept = pace.known_paces("m")
    assert [p.new_tokens for p in kept if p.stage == "sampling"] == list(range(2004, 2012))
    assert (
        sum(p.stage == "evaluation" for p in kept) == 1
        and pace.fastest(kept) == 2011 / 4
        and pace.known_paces("other") == []
    )


@pytest.mark.parametrize(
    "content",
    [
        "{broken",
        "[]",
        '{"m": 583.0}',
        '{"m": [{"stage": "sampling"}, 5]}',
        '{"m": [{"stage": "sampling", "requests": 0, "at_once": 1, "new_tokens": 1, "generating_s": 1, "other_s": 1}]}',
    ],
)
def test_a_damaged_or_older_file_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    (tmp_path / pace.PACE_FILE).write_text(content)
    assert pace.known_paces("m") == []
    pace.remember_pace("m", QUIET)
    assert pace.known_paces("m") == [QUIET] and json.loads((tmp_path / pace.PACE_FILE).read_text())["m"]
    assert cache.recall_value("nothing.json", "m") is None
