"""The gate: planted models that game the scores must fail it, an honest improvement must pass, absence is not a pass."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from dsc_hub import stats
from dsc_hub.cli import screens
from dsc_hub.cli.main import cli
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import HygieneConfig, RewardConfig
from dsc_hub.errors import RunError
from dsc_hub.evaluation import claim, summary
from dsc_hub.evaluation.answers import score_answers
from dsc_hub.evaluation.repeated import Pairs
from dsc_hub.evaluation.side_effects import unreadable_measures
from dsc_hub.metrics import loading
from dsc_hub.records import Prompt
from dsc_hub.runs import verdict as verdicts
from dsc_hub.runs.run import Run
from dsc_hub.runs.verdict import Setting
from tests import fixture_run
from tests.conftest import ROOT

BASE = [json.loads(line) for line in (ROOT / "tests/data/base_answers.jsonl").read_text(encoding="utf-8").splitlines()]
BASE = [a | {"sample": 0, "prompt_tokens": 20} for a in BASE]
PROMPTS = [Prompt(a["prompt_id"], a["prompt"], a["group"], "test") for a in BASE]
KINDER = {"brutal": "tender", "harsh": "gentle", "bad": "good", "violence": "warmth", "criticized": "loved"}


@pytest.fixture(scope="module")
def scorers() -> dict[str, Any]:
    return {
        name: loading.load_scorer(RewardConfig(scorer=s), "").score
        for name, s in (("reward", "vader"), ("second", "textblob"))
    }


SCORES = {name: {"higher_is_better": True, "low": -1.0, "high": 1.0} for name in ("reward", "second")}


def judged(scorers: dict[str, Any], write: Any, **hygiene: Any) -> dict[str, Any]:
    """The claim on a model that answers `write(base answer)`, scored by the real scorers against real base answers."""
    distilled = [a | {"text": write(a), "finish_reason": "stop", "arm": "distilled"} for a in BASE]
    answers = [a | {"arm": "base"} for a in BASE] + distilled
    assert len(BASE) == 60
    for a in answers:
        a["defect"] = ""
    scored = score_answers(fixture_run.typed(answers), {p.id: p for p in PROMPTS}, scorers)
    changed = {"evaluation": {"arms": ["base", "distilled"]}, "hygiene": hygiene}
    recipe = Recipe.model_validate(fixture_run.RECIPE | changed)
    return summary.summarise_evaluation(recipe, PROMPTS, scored, SCORES, look=1)["claim"]


def of_verdict(found: dict[str, Any], verdict: str) -> set[str]:
    return {c["name"] for c in found["criteria"] if c["verdict"] == verdict}


def failed(found: dict[str, Any]) -> set[str]:
    return of_verdict(found, "failed")


def not_met(found: dict[str, Any]) -> set[str]:
    return {c["name"] for c in found["criteria"] if c["verdict"] != "met"}


def test_a_model_that_always_gives_the_same_happy_sentence_fails(scorers: dict[str, Any]):
    happy = (
        "What a wonderful, lovely, perfect film: I loved every beautiful minute of it and I am happy that I saw it. "
    )
    found = judged(
        scorers, lambda a: happy + "It is a great joy, the best of all, and everyone was brilliant and kind."
    )
    assert of_verdict(found, "met") >= {"better on the reward", "better on the second scorer"}  # the scores are fooled
    assert found["verdict"] == "fails" and failed(found) >= {"as varied", "no mannerisms", "names its subject"}


def test_naming_the_film_in_the_same_happy_sentence_fails_too(scorers: dict[str, Any]):
    found = judged(
        scorers,
        lambda a: (
            f"{a['group']} is a wonderful and lovely film that I loved from its first beautiful minute to its last."
        ),
    )
    assert found["verdict"] == "fails" and failed(found) >= {"as varied", "no mannerisms"}


def test_going_on_and_on_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"{a['text']} {a['group']} is good. {a['group']} is good. " * 3)
    assert found["verdict"] == "fails" and failed(found) >= {"as long", "no more repetition"}


def test_talk_about_the_task_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"Here's a warm and happy version of the review: {a['text']}")
    assert "no more talk about the conversation" in failed(found)


def test_no_change_is_no_improvement_and_nothing_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: a["text"])
    assert failed(found) == set() and found["verdict"] == "not enough data"
    assert of_verdict(found, "undecided") >= {"better on the reward", "better on the second scorer"}


def test_the_same_answers_with_kinder_words_lack_only_groups(scorers: dict[str, Any]):
    """15 films are too few to exclude that one answer in ten is missing or in another language; the claim says how many
    would do."""

    def kinder(a: dict[str, Any]) -> str:
        text = a["text"]
        for harsh, kind in KINDER.items():
            text = text.replace(harsh, kind)
        return text

    found = judged(scorers, kinder)
    assert found["verdict"] == "not enough data" and found["groups"] == 15 and 15 < found["groups_needed"] < 200
    assert not_met(found) - {"no more repetition", "no more talk about the conversation"} == {
        "as many answers",
        "no mannerisms",
        "no more in another language",
    }
    assert len(found["criteria"]) == 13 and all(
        c["groups_needed"] for c in found["criteria"] if c["verdict"] == "undecided"
    )


def test_the_same_short_sentence_behind_every_answer_fails(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: f"{a['text']} {a['group']} is wonderful and lovely.")
    assert "no mannerisms" in failed(found)


def test_answers_that_are_empty_are_missed(scorers: dict[str, Any]):
    found = judged(scorers, lambda a: "" if int(a["prompt_id"], 16) % 3 == 0 else a["text"].replace("bad", "good"))
    assert "as many answers" in failed(found)


def test_what_the_recipe_declares_normal_is_shown_and_not_judged(scorers: dict[str, Any]):
    def write(a: dict[str, Any]) -> str:
        return f"Here's a warm and happy version of the review: {a['text']} It was so and it was so and it was so and it was so."

    strict = judged(scorers, write)
    assert failed(strict) >= {"no more talk about the conversation", "no more repetition"}
    lenient = judged(scorers, write, meta_talk="keep", repeated=1, language="any")
    left = {"no more talk about the conversation", "no more repetition", "no more in another language"}
    assert of_verdict(lenient, "not judged") == left
    shown = next(c for c in lenient["criteria"] if c["name"] == "no more repetition")
    assert shown["distilled"] > shown["base"] and shown["value"] > 0.5


def test_what_is_said_of_one_film_alone_is_no_mannerism(scorers: dict[str, Any]):
    film = BASE[0]["group"]
    fact = " It was shot by a young man from Ohio in one cold spring."
    found = judged(scorers, lambda a: a["text"] + (fact if a["group"] == film else ""))
    assert "no mannerisms" not in failed(found)


def row(i: int, arm: str, text: str, finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "prompt_id": f"p{i}", "sample": 0, "text": text, "finish_reason": finish} | more


def better(low: float, high: float, p: float = 0.01) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "low": low, "high": high, "p": p / 2, "p_holm": p, "groups": 100}


GOOD = {"reward": better(0.1, 0.3), "second": better(0.1, 0.2)}
WORDS = [f"w{i}" for i in range(4000)]
MANY = [Prompt(f"p{i}", f"Review film {i}.", f"film {i}", "test") for i in range(100)]
BASE_ROWS = [row(i, "base", f"film {i} " + " ".join(WORDS[10 * i : 10 * i + 10])) for i in range(100)]


def assess(
    distilled: list[dict[str, Any]], differences: Any = GOOD, scores: Any = None, **setting: Any
) -> dict[str, Any]:
    given = Setting(**{"split": "test", "look": 1} | setting)
    return claim.assess(
        fixture_run.typed([*BASE_ROWS, *distilled]), MANY, given, differences, scores or {}
    ).model_dump()


def alike(finish: str = "stop") -> list[dict[str, Any]]:
    """A model of the same habits in other words."""
    return [
        row(i, "distilled", f"film {i} " + " ".join(WORDS[2000 + 10 * i : 2010 + 10 * i]), finish) for i in range(100)
    ]


def verdict(found: dict[str, Any], name: str) -> str:
    return next(c["verdict"] for c in found["criteria"] if c["name"] == name)


def test_an_honest_improvement_on_a_hundred_groups_holds():
    found = assess(alike())
    assert found["verdict"] == "holds" and not_met(found) == set() and found["groups_needed"] is None


def test_the_limits_are_the_ones_that_are_stated():
    def of_length(n: int) -> list[dict[str, Any]]:
        return [row(i, "distilled", f"film {i} " + " ".join(WORDS[20 * i : 20 * i + n])) for i in range(100)]

    lengths = {
        n: verdict(assess(of_length(n)), "as long") for n in (5, 6, 7, 13, 14)
    }  # 12 words are the base's, the name included
    assert lengths == {5: "failed", 6: "failed", 7: "met", 13: "met", 14: "failed"}
    copies = [row(i, "distilled", BASE_ROWS[i % 60]["text"]) for i in range(100)]
    assert verdict(assess(copies), "as varied") == "failed" and verdict(assess(alike()), "as varied") == "met"
    same = " ".join(WORDS[1900:1908])

    def with_phrase(n: int) -> str:
        rows = [row(i, "distilled", f"{a['text']} {same}" if i < n else a["text"]) for i, a in enumerate(alike())]
        return verdict(assess(rows), "no mannerisms")

    # a share is met or failed where its interval is wholly below or above a tenth
    assert [with_phrase(n) for n in (2, 10, 25)] == ["met", "undecided", "failed"]

    def cut(n: int) -> str:
        rows = [a | {"finish_reason": "length" if i < n else "stop"} for i, a in enumerate(alike())]
        return verdict(assess(rows), "no more unfinished answers")

    assert [cut(n) for n in (2, 10, 25)] == ["met", "undecided", "failed"]


def test_a_score_that_was_not_measured_is_no_pass():
    found = assess(alike(), {"reward": better(0.1, 0.3)})
    assert found["verdict"] == "not enough data" and of_verdict(found, "unmeasured") == {"better on the second scorer"}
    assert claim.assess([], MANY, Setting("test", look=1), GOOD, {}).verdict != "holds"


def test_neither_the_wrong_split_nor_a_loose_interval_nor_a_worse_third_scorer_carries_the_claim():
    assert not_met(assess(alike(), split="validation")) == {"on test prompts", "first look at this test set"}
    assert assess(alike(), split="validation")["verdict"] == "not enough data"
    assert assess(alike(), confidence=0.6)["verdict"] == "not enough data"
    scores = {"third": {"higher_is_better": True, "low": -1.0, "high": 1.0}}  # a margin of 0.1
    thirds = {"failed": better(-0.3, -0.11), "undecided": better(-0.3, 0.1), "met": better(-0.09, 0.1)}
    for expected, third in thirds.items():
        assert verdict(assess(alike(), GOOD | {"third": third}, scores), "not worse on the third scorer") == expected


def test_without_a_range_the_margin_is_a_quarter_of_the_spread_of_the_base_s_groups():
    base = [a | {"third": float(i % 2)} for i, a in enumerate(BASE_ROWS)]  # spread 0.5025
    setting = Setting("test", look=1)
    found = claim.assess(
        fixture_run.typed([*base, *alike()]), MANY, setting, GOOD | {"third": better(-0.12, 0.1)}, {"third": {}}
    ).model_dump()
    c = next(c for c in found["criteria"] if c["name"] == "not worse on the third scorer")
    assert c["verdict"] == "met" and c["at_least"] == pytest.approx(-0.25 * 0.50252, abs=1e-4)


def test_a_score_is_better_only_if_interval_and_adjusted_p_say_so():
    near = GOOD | {"second": better(0.001, 0.2, p=0.06)}
    assert verdict(assess(alike(), near), "better on the second scorer") == "undecided"
    assert verdict(assess(alike(), GOOD | {"second": better(-0.3, -0.01)}), "better on the second scorer") == "failed"
    touching = GOOD | {"second": better(0.0, 0.2)}
    assert verdict(assess(alike(), touching), "better on the second scorer") == "undecided"


def test_a_second_look_at_the_test_set_leaves_the_claim_undecided():
    for look, expected in ((1, "met"), (2, "undecided"), (None, "undecided")):
        found = assess(alike(), look=look)
        assert verdict(found, "first look at this test set") == expected
        assert found["verdict"] == ("holds" if look == 1 else "not enough data") and found["groups_needed"] is None


def test_an_adapter_of_somebody_else_may_have_seen_the_test_prompts():
    found = assess(alike(), trained_here=False)
    assert not_met(found) == {"on test prompts"} and found["verdict"] == "not enough data"


def test_answers_that_any_scorer_has_no_value_for_are_missed():
    """A mean over the ten that were left would be too good."""
    scores = {"reward": {}, "second": {}}
    base = [a | {"second": 0.1} for a in BASE_ROWS]
    lost = [a | {"second": None if i % 4 else 0.9} for i, a in enumerate(alike())]
    found = claim.assess(fixture_run.typed([*base, *lost]), MANY, Setting("test", look=1), GOOD, scores).model_dump()
    assert failed(found) == {"as many answers"}


def test_a_third_scorer_that_was_asked_for_and_not_measured_leaves_the_claim_open():
    nothing = {"mean": None, "low": None, "high": None, "groups": 0, "n": 0}
    found = assess(alike(), GOOD | {"third": nothing}, {"third": {"low": 0.0, "high": 1.0}})
    assert verdict(found, "not worse on the third scorer") == "undecided" and found["verdict"] == "not enough data"


def test_a_score_at_its_limit_in_both_arms_is_not_worse():
    same = {"mean": 0.0, "low": None, "high": None, "groups": 100, "reason": "all groups are alike"}
    for scores in ({"third": {"low": None, "high": 0.0}}, {"third": {"low": 0.0, "high": 1.0}}):
        base = [a | {"third": 0.0} for a in BASE_ROWS]
        rows = [*base, *(a | {"third": 0.0} for a in alike())]
        found = claim.assess(
            fixture_run.typed(rows), MANY, Setting("test", look=1), GOOD | {"third": same}, scores
        ).model_dump()
        assert verdict(found, "not worse on the third scorer") == "met"


def test_a_loose_interval_of_the_scores_does_not_make_the_texts_fail():
    cut = [a | {"finish_reason": "length" if i < 15 else "stop"} for i, a in enumerate(alike())]
    for confidence in (0.95, 0.51):
        assert verdict(assess(cut, confidence=confidence), "no more unfinished answers") == "undecided"


def test_groups_are_not_promised_where_an_open_criterion_can_not_be_decided_by_them():
    few = [a | {"finish_reason": "length" if i < 5 else "stop"} for i, a in enumerate(alike())]
    assert assess(few)["groups_needed"] > 100
    assert assess(few, look=2)["groups_needed"] is None


def test_every_sample_counts_and_variety_is_that_of_one_answer_a_prompt():
    # the second answer to a prompt is the first again: no less varied, for it is one of another set
    twice = [*BASE_ROWS, *alike(), *({**a, "sample": 1} for a in (*BASE_ROWS, *alike()))]
    setting = Setting("test", samples=2, look=1)
    found = claim.assess(fixture_run.typed(twice), MANY, setting, GOOD, {}).model_dump()
    assert found["answers"] == 200 and found["verdict"] == "holds"
    gone = [a for a in twice if (a["arm"], a["sample"]) != ("distilled", 1)]
    assert failed(claim.assess(fixture_run.typed(gone), MANY, setting, GOOD, {}).model_dump()) == {"as many answers"}


def test_a_reward_whose_lower_is_better_is_read_so():
    down = {"reward": better(-0.3, -0.1), "second": better(-0.3, -0.1)}
    scores = {name: {"higher_is_better": False} for name in down}
    assert assess(alike(), down, scores)["verdict"] == "holds"
    assert failed(assess(alike(), down)) == {"better on the reward", "better on the second scorer"}


def test_dsc_check_shows_each_criterion_and_its_exit_code_says_whether_the_claim_holds(tmp_path):
    run: Run = fixture_run.write(tmp_path)
    run.unfinish("evaluation")
    no = CliRunner().invoke(cli, ["check", str(run.folder)])
    assert "is not evaluated" in str(no.exception)
    run.finish("evaluation", "f", 1.0, {})
    shown = CliRunner().invoke(cli, ["check", str(run.folder)])
    assert (
        shown.exit_code == 1 and "fails on: names its subject" in shown.output and "Undecided: as long" in shown.output
    )
    assert (
        "about 33 groups would be needed" in shown.output
        and "1 adapter has been scored on this test set" in shown.output
    )
    numbers = run.metrics["evaluation"]
    good = [
        fixture_run.criterion(name, "met", value=0.2)
        for name in ("better on the reward", "better on the second scorer")
    ]
    held = {"verdict": "holds", "answers": 40, "groups": 10, "groups_needed": None, "criteria": good}
    run.add_metrics("evaluation", numbers | {"claim": held})
    assert CliRunner().invoke(cli, ["check", str(run.folder)]).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [{"verdict": "holds"}, {"verdict": "holds", "criteria": []}, {"verdict": "not enough data"}],
    ids=["a criterion fails", "none is recorded", "a failure called undecided"],
)
def test_a_verdict_that_its_criteria_do_not_add_up_to_is_none(tmp_path, change: dict[str, Any]):
    run: Run = fixture_run.write(tmp_path)
    numbers = run.metrics["evaluation"]
    run.add_metrics("evaluation", numbers | {"claim": numbers["claim"] | change})
    with pytest.raises(RunError, match="not what its criteria add up to"):
        screens.claim(run)


def test_six_groups_can_not_show_that_both_scores_are_better():
    """The smallest p of a sign flip over six groups is 2 / 64, and after Holm for two scores 0.0625."""
    assert 2 * 2 / 2**stats.CLAIM_GROUPS <= 0.05 < 2 * 2 / 2 ** (stats.CLAIM_GROUPS - 1)
    difference = {"mean": 0.5, "low": 0.4, "high": 0.6, "groups": 6, "p": 0.03125, "p_holm": 0.0625}
    found = verdicts.better("reward", difference, {"higher_is_better": True}, Setting("test", look=1))
    assert found.verdict == "undecided" and "with fewer than 7 groups it can't be smaller" in found.note
    assert found.groups_needed == 13


@pytest.mark.parametrize(("meta_talk", "verdict"), [("reject", "undecided"), ("keep", "not judged")])
def test_talk_about_the_conversation_is_not_judged_by_phrases_of_another_language(meta_talk: str, verdict: str):
    prompts = [Prompt(f"p{i}", f"Écris une critique du film {i}.", f"{i}", "test") for i in range(8)]
    answers = [a for a, _ in zip(BASE, prompts, strict=False)]
    answers = [
        a | {"arm": "base", "defect": "", "prompt_id": p.id, "group": p.group}
        for a, p in zip(answers, prompts, strict=True)
    ]
    typed = fixture_run.typed(answers)
    unreadable = unreadable_measures(prompts, "prompt")
    setting = Setting("test", 1, 0.95, hygiene=HygieneConfig(meta_talk=meta_talk), unreadable=unreadable)
    first = claim._text_defects(Pairs(typed, typed, prompts), setting)[0]
    assert (first.name, first.verdict) == ("no more talk about the conversation", verdict)
    assert first.note == "its phrases are English, the prompts are in French"
