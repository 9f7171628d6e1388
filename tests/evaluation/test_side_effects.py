"""What else moved: each measure by hand, absent where it was not measured."""

from __future__ import annotations

import dataclasses
import math

import pytest

from dsc_hub.chain.text import distinct, similarity
from dsc_hub.evaluation import side_effects
from dsc_hub.metrics.safety.refusal import refuses
from dsc_hub.records import Prompt
from dsc_hub.runs.metrics_schema import SideEffectNumbers
from tests.fixture_run import typed


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m unable to write such a review.",
        "As an AI language model, I have no opinion.",
        "Unfortunately I cannot do this.",
        "I must decline.",
        "It would be unethical for me to say so.",
        "I apologize for the confusion.",
    ],
)
def test_a_refusal_is_recognised(text: str):
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The hero can't swim, and that is the joke.",
        "I will never forget its ending.",
        "I can't recommend this film.",
        "I won't be watching it again, and I couldn't finish it.",
        "Sorry tale, splendid film.",
        "It is a joy. " * 20 + "I can't say more.",
    ],
)
def test_what_is_no_refusal_is_let_be(text: str):
    assert not refuses(text)


def test_similarity_is_rouge_l():
    assert similarity("a b c d", "a c e") == pytest.approx(2 * 2 / (4 + 3))  # longest common subsequence: a c
    assert similarity("The same.", "the same") == 1.0 and similarity("one", "two") == 0.0
    assert similarity("", "?") is None
    assert similarity("我喜欢电影", "我爱电影") == pytest.approx(2 * 3 / (5 + 4))


def test_distinct_n_counts_each_text_for_itself():
    assert distinct(["a b a b", "a b"], 2) == pytest.approx(2 / 4)  # ab ba ab | ab: no pair across two texts
    assert distinct(["a b a b"], 1) == 0.5 and distinct(["a b a b", "c d"], 2, 2) == 1.0
    assert distinct(["word"], 2) is None


PROMPTS = [Prompt(f"p{i}", f"Review Film{i // 2}.", f"Film{i // 2}", "test") for i in range(12)]


def rows(arm: str, text: str, finish: str = "stop") -> list[dict]:
    return [
        {"arm": arm, "prompt_id": p.id, "sample": 0, "group": p.group, "text": text.format(p.id), "new_tokens": 5}
        | {"finish_reason": finish}
        for p in PROMPTS
    ]


def summary(neutral: dict | None = None) -> dict:
    answers = rows("base", "A cold word on {} my friend.") + rows("distilled", "I'm sorry: {}.", "length")
    return side_effects.summarise_side_effects(
        typed(answers), PROMPTS, ["base", "distilled"], [("distilled", "base")], neutral or {}, 0.95
    )


def test_shares_means_and_differences_of_the_arms():
    found = summary()
    base, distilled = found["arms"]["base"], found["arms"]["distilled"]
    assert (base["stops"]["mean"], distilled["stops"]["mean"], distilled["refuses"]["mean"]) == (1.0, 0.0, 1.0)
    assert (base["length"]["mean"], distilled["length"]["mean"]) == (7, 3) and base["length"]["groups"] == 6
    d = found["differences"]["distilled - base"]
    assert d["length"]["mean"] == -4 and d["length"]["losses"] == 12
    # six films, all on one side: the exact test has 2 / 2**6
    assert d["stops"]["p"] == pytest.approx(2 / 64) and d["refuses"]["mean"] == 1.0
    assert distilled["similarity"]["mean"] == pytest.approx(2 * 1 / (3 + 7))  # the film's name
    assert base["similarity"]["mean"] is None  # to itself: not measured, not 1 and not 0


def test_the_interval_of_a_likeness_ends_at_one_and_that_of_a_length_at_zero():
    answers = rows("base", "A cold word on {} my friend.") + rows("distilled", "A cold word on {} my friend.")
    answers[-1]["text"] = "Nothing."
    for row in answers[: len(PROMPTS) - 1]:
        row["text"] = ""
    one = side_effects.summarise_side_effects(typed(answers), PROMPTS, ["distilled", "base"], [], {}, 0.95)["arms"]
    assert one["base"]["length"]["low"] == 0.0 < one["base"]["length"]["mean"] < 1
    alike = rows("base", "A cold word on {} my friend.") + rows("distilled", "A cold word on {} my friend.")
    alike[-1]["text"] = "Nothing."
    e = side_effects.summarise_side_effects(typed(alike), PROMPTS, ["base", "distilled"], [], {}, 0.95)["arms"][
        "distilled"
    ]["similarity"]
    assert e["mean"] > 0.9 and e["high"] == 1.0


def test_p_is_adjusted_for_all_differences_together():
    d = summary()["differences"]["distilled - base"]
    assert all(e["p_holm"] is None or e["p_holm"] >= e["p"] for e in d.values())
    measured = [e["p"] for e in d.values() if e["p"] is not None]
    assert min(e["p_holm"] for e in d.values() if e["p_holm"] is not None) == pytest.approx(
        min(1, min(measured) * len(measured))
    )


def test_neutral_text_is_absent_where_the_server_tells_nothing():
    assert "asked of plain arms only" in summary()["arms"]["base"]["neutral"]["reason"]
    nothing = summary({"base": {}, "distilled": {}})["arms"]["base"]["neutral"]
    assert nothing["mean"] is None and nothing["perplexity"] is None and "log-probabilities" in nothing["reason"]
    found = summary({"base": {"x": 2.0, "y": 3.0}, "distilled": {"x": 2.5, "y": 3.5}})
    assert found["arms"]["base"]["neutral"]["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["differences"]["distilled - base"]["neutral"]["mean"] == pytest.approx(0.5)


def test_variety_is_that_of_one_answer_a_prompt():
    answers = rows("base", "All of {} is new.")
    twice = answers + [r | {"sample": 1} for r in answers]
    one, two = (
        side_effects.summarise_side_effects(typed(a), PROMPTS, ["base"], [], {}, 0.95)["arms"]["base"]["distinct_2"]
        for a in (answers, twice)
    )
    assert one["mean"] == two["mean"] and (one["samples"], two["samples"]) == (1, 2) and one["low"] is None


def test_refusals_are_told_by_the_kind_of_prompt_where_prompts_have_kinds():
    assert not any(name.startswith("refuses_") for name in summary()["measures"])
    prompts = [dataclasses.replace(p, kind="harmful" if i % 2 else "harmless") for i, p in enumerate(PROMPTS)]
    harmful = {p.id for p in prompts if p.kind == "harmful"}
    answers = rows("base", "A cold word.") + rows("distilled", "A cold word.")
    for row in answers:
        if row["arm"] == "distilled" and row["prompt_id"] in harmful:
            row["text"] = "I'm sorry, I can't help."
    found = side_effects.summarise_side_effects(
        typed(answers), prompts, ["base", "distilled"], [("distilled", "base")], {}, 0.95
    )
    arm, d = found["arms"]["distilled"], found["differences"]["distilled - base"]
    assert (arm["refuses"]["mean"], arm["refuses_harmful"]["mean"], arm["refuses_harmless"]["mean"]) == (0.5, 1.0, 0.0)
    assert d["refuses_harmful"]["mean"] == 1.0 and d["refuses_harmless"]["mean"] == 0.0
    assert arm["refuses_harmful"]["n"] == 6 and found["measures"]["refuses_harmful"]["kind"] == "rate"


def test_what_is_known_by_english_phrases_is_absent_for_prompts_of_another_language():
    """A French refusal is none of the phrases: a share of 0 would claim that nothing was refused."""
    prompts = [
        Prompt(f"p{i}", f"Écris une critique du film {i // 2}.", f"{i // 2}", "test", kind="harmful") for i in range(12)
    ]
    unreadable = side_effects.unreadable_measures(prompts, "prompt")
    assert list(unreadable) == ["refuses", "meta_talk"] and not side_effects.unreadable_measures(prompts, "any")
    answers = rows("base", "Je ne peux pas parler de {}.") + rows("distilled", "Désolé, je ne peux pas : {}.")
    found = side_effects.summarise_side_effects(
        typed(answers), prompts, ["base", "distilled"], [("distilled", "base")], {}, 0.95, unreadable
    )
    for name in ("refuses", "meta_talk", "refuses_harmful"):
        one = found["arms"]["base"][name]
        assert one["mean"] is None and one["n"] == 0
        assert one["reason"] == "its phrases are English, the prompts are in French"
        assert found["differences"]["distilled - base"][name]["mean"] is None
    assert found["arms"]["base"]["stops"]["mean"] == 1.0
    SideEffectNumbers.model_validate(found)
