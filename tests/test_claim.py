"""The gate: planted models that game the scores must fail it, an honest improvement must pass, absence is not a pass."""

from __future__ import annotations

import json
from typing import Any

import fixture_run
import pytest
from click.testing import CliRunner

from dsc_hub import claim, evaluation, metrics, show
from dsc_hub.cli import cli
from dsc_hub.errors import RunError
from dsc_hub.recipe import Recipe, Reward
from dsc_hub.records import Prompt
from dsc_hub.runs import Run
from tests.conftest import ROOT

BASE = [json.loads(line) for line in (ROOT / "tests/data/base_answers.jsonl").read_text(encoding="utf-8").splitlines()]
BASE = [a | {"sample": 0, "prompt_tokens": 20} for a in BASE]
PROMPTS = [Prompt(a["prompt_id"], a["prompt"], a["group"], "test") for a in BASE]
KINDER = {"brutal": "tender", "harsh": "gentle", "bad": "good", "violence": "warmth", "criticized": "loved"}


@pytest.fixture(scope="module")
def scorers() -> dict[str, Any]:
    return {name: metrics.load(Reward(scorer=s), "").score for name, s in (("reward", "vader"), ("second", "textblob"))}


def judged(scorers: dict[str, Any], write: Any) -> dict[str, Any]:
    """The claim on a model that answers `write(base answer)`, scored by the real scorers against real base answers."""
    distilled = [a | {"text": write(a), "finish_reason": "stop", "arm": "distilled"} for a in BASE]
    answers = [a | {"arm": "base"} for a in BASE] + distilled
    assert len(BASE) == 60
    for a in answers:
        a["defect"] = ""
    evaluation.score_answers(answers, {p.id: p for p in PROMPTS}, scorers)
    recipe = Recipe.model_validate(fixture_run.RECIPE | {"evaluation": {"arms": ["base", "distilled"]}})
    return evaluation.summarise(recipe, PROMPTS, answers, dict.fromkeys(scorers, True))["claim"]


def failed(found: dict[str, Any]) -> set[str]:
    return {c["name"] for c in found["criteria"] if c["holds"] is False}


def test_a_model_that_always_gives_the_same_happy_sentence_fails(scorers: dict[str, Any]):
    happy = (
        "What a wonderful, lovely, perfect film: I loved every beautiful minute of it and I am happy that I saw it. "
    )
    found = judged(
        scorers, lambda a: happy + "It is a great joy, the best of all, and everyone was brilliant and kind."
    )
    by_name = {c["name"]: c["holds"] for c in found["criteria"]}
    assert by_name["better on the reward"] and by_name["better on the second scorer"]  # the scores are fooled
    assert not found["holds"] and failed(found) >= {"as varied", "no mannerisms", "names its subject"}


def test_naming_the_film_in_the_same_happy_sentence_fails_too(scorers: dict[str, Any]):
    found = judged(
        scorers,
        lambda a: (
            f"{a['group']} is a wonderful and lovely film that I loved from its first beautiful minute to its last."
        ),
    )
    assert not found["holds"] and failed(found) >= {"as varied", "no mannerisms"}


def test_going_on_and_on_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"{a['text']} {a['group']} is good. {a['group']} is good. " * 3)
    assert not found["holds"] and failed(found) >= {"as long", "no more repetition"}


def test_talk_about_the_task_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"Here's a warm and happy version of the review: {a['text']}")
    assert "no more talk about the conversation" in failed(found)


def test_no_change_is_no_improvement(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: a["text"])
    assert failed(found) == {"better on the reward", "better on the second scorer"} and not found["holds"]


def test_the_same_answers_with_kinder_words_pass(scorers: dict[str, Any]):
    def kinder(a: dict[str, Any]) -> str:
        text = a["text"]
        for harsh, kind in KINDER.items():
            text = text.replace(harsh, kind)
        return text

    found = judged(scorers, kinder)
    assert found["holds"] and all(c["holds"] for c in found["criteria"]) and len(found["criteria"]) == 12


def test_the_same_short_sentence_behind_every_answer_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"{a['text']} {a['group']} is wonderful and lovely.")
    assert "no mannerisms" in failed(found)


def test_answers_that_are_empty_are_missed(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: "" if int(a["prompt_id"], 16) % 5 == 0 else a["text"].replace("bad", "good"))
    assert "as many answers" in failed(found)


def test_what_is_said_of_one_film_alone_is_no_mannerism(scorers: dict[str, Any]):
    film = BASE[0]["group"]
    fact = " It was shot by a young man from Ohio in one cold spring."
    found = judged(scorers, lambda a: a["text"] + (fact if a["group"] == film else ""))
    assert "no mannerisms" not in failed(found)


def row(i: int, arm: str, text: str, finish: str = "stop") -> dict[str, Any]:
    return {"arm": arm, "prompt_id": f"p{i}", "sample": 0, "text": text, "finish_reason": finish}


def judge(answers, prompts, differences, split="test", confidence=0.95, higher=None) -> dict[str, Any]:
    return claim.judge(answers, prompts, split, confidence, differences, higher or {})


def better(low: float, high: float) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "low": low, "high": high}


def test_the_limits_are_the_ones_that_are_told():
    prompts = [Prompt(f"p{i}", f"Review film {i}.", f"review {i}", "test") for i in range(100)]
    words = [f"w{i}" for i in range(2000)]
    base = [row(i, "base", " ".join(words[10 * i : 10 * i + 10])) for i in range(100)]

    def hold(distilled: list[dict[str, Any]], name: str) -> bool | None:
        found = judge(base + distilled, prompts, {"reward": better(0.1, 0.3), "second": better(0.1, 0.3)})
        return next(c["holds"] for c in found["criteria"] if c["name"] == name)

    def of_length(n: int) -> list[dict[str, Any]]:
        return [row(i, "distilled", " ".join(words[20 * i : 20 * i + n])) for i in range(100)]

    assert [hold(of_length(n), "as long") for n in (6, 7, 13, 14)] == [False, True, True, False]
    assert hold(of_length(10), "as varied") and not hold(
        [row(i, "distilled", base[i % 70]["text"]) for i in range(100)], "as varied"
    )
    same = " ".join(words[1900:1908])
    mixed = [row(i, "distilled", same if i < 5 else base[i]["text"]) for i in range(100)]
    assert hold(mixed, "no mannerisms") and not hold(
        [*mixed[:5], row(5, "distilled", same), *mixed[6:]], "no mannerisms"
    )
    cut = [row(i, "distilled", base[i]["text"], "length" if i == 7 else "stop") for i in range(100)]
    assert not hold(cut, "no more unfinished answers") and hold(of_length(10), "no more unfinished answers")


def test_a_score_that_was_not_measured_is_no_pass():
    prompts = [Prompt("p0", "Review it.", "Review it.", "test")]
    answers = [row(0, "base", "one two three"), row(0, "distilled", "four five six")]
    found = judge(answers, prompts, {"reward": better(0.1, 0.3)})
    assert not found["holds"] and failed(found) == set()
    assert {c["name"]: c["holds"] for c in found["criteria"]}["names its subject"] is None
    assert judge(answers, prompts, {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)})["holds"]
    assert not judge([], prompts, {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)})["holds"]


def test_neither_the_wrong_split_nor_a_loose_interval_nor_a_worse_third_scorer_carries_the_claim():
    prompts = [Prompt("p0", "Review it.", "Review it.", "test")]
    answers = [row(0, "base", "one two three"), row(0, "distilled", "four five six")]
    good = {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)}
    assert judge(answers, prompts, good)["holds"]
    assert failed(judge(answers, prompts, good, split="validation")) == {"on test prompts"}
    assert not judge(answers, prompts, good, confidence=0.6)["holds"]
    assert not judge(answers, prompts, good | {"second": better(0.2, 0.2)})["holds"]
    assert failed(judge(answers, prompts, good | {"third": better(-0.3, -0.1)})) == {"not worse on the third scorer"}
    assert judge(answers, prompts, good | {"third": better(-0.3, 0.1)})["holds"]


def test_an_adapter_of_somebody_else_may_have_seen_the_test_prompts():
    prompts = [Prompt("p0", "Review it.", "Review it.", "test")]
    answers = [row(0, "base", "one two three"), row(0, "distilled", "four five six")]
    good = {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)}
    found = claim.judge(answers, prompts, "test", 0.95, good, {}, trained_here=False)
    assert failed(found) == {"on test prompts"} and not found["holds"]


def test_every_sample_counts_and_variety_is_that_of_one_answer_a_prompt():
    prompts = [Prompt(f"p{i}", f"Review film {i}.", f"review {i}", "test") for i in range(50)]
    base, distilled = (
        [row(i, arm, " ".join(f"{arm}{i}word{j}" for j in range(10))) for i in range(50)]
        for arm in ("base", "distilled")
    )
    # the second answer to a prompt is the first again: no less varied, for it is one of another set
    twice = [*base, *distilled, *({**a, "sample": 1} for a in (*base, *distilled))]
    good = {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)}
    found = claim.judge(twice, prompts, "test", 0.95, good, {}, samples=2)
    assert found["answers"] == 100 and found["holds"]
    gone = [a for a in twice if (a["arm"], a["prompt_id"], a["sample"]) != ("distilled", "p7", 1)]
    assert failed(claim.judge(gone, prompts, "test", 0.95, good, {}, samples=2)) == {"as many answers"}


def test_a_reward_whose_lower_is_better_is_read_so():
    prompts = [Prompt("p0", "Review it.", "Review it.", "test")]
    answers = [row(0, "base", "one two three"), row(0, "distilled", "four five six")]
    down = {"reward": better(-0.3, -0.1), "second": better(-0.3, -0.1)}
    assert judge(answers, prompts, down, higher={"reward": False, "second": False})["holds"]
    assert not judge(answers, prompts, down)["holds"]


def test_dsc_check_tells_each_criterion_and_its_exit_code_says_whether_the_claim_holds(tmp_path):
    run: Run = fixture_run.write(tmp_path)
    run.unfinish("evaluation")
    no = CliRunner().invoke(cli, ["check", str(run.folder)])
    assert "is not evaluated" in str(no.exception)
    run.finish("evaluation", "f", 1.0, {})
    told = CliRunner().invoke(cli, ["check", str(run.folder)])
    assert told.exit_code == 1 and "does not hold" in told.output and "names its subject" in told.output
    numbers = run.metrics["evaluation"]
    good = [
        {"name": name, "holds": True, "told": "so"} for name in ("better on the reward", "better on the second scorer")
    ]
    run.add_metrics("evaluation", numbers | {"claim": {"holds": True, "answers": 40, "criteria": good}})
    assert CliRunner().invoke(cli, ["check", str(run.folder)]).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [{"holds": True}, {"holds": True, "criteria": []}, {"holds": True, "answers": 0}],
    ids=["a criterion fails", "none is there", "nothing was compared"],
)
def test_a_verdict_that_its_criteria_do_not_add_up_to_is_none(tmp_path, change: dict[str, Any]):
    run: Run = fixture_run.write(tmp_path)
    numbers = run.metrics["evaluation"]
    run.add_metrics("evaluation", numbers | {"claim": numbers["claim"] | change})
    with pytest.raises(RunError, match="not what its criteria add up to"):
        show.claim(run)
