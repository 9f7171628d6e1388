"""The safety measurement: the rule, real (tiny) classifiers, and a whole recipe's scorer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest

from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.errors import MetricError
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.safety.safety import unsafe_of
from dsc_hub.records import Prompt
from tests.cli.test_cli import error
from tests.conftest import ROOT

FILE = ROOT / "dsc_hub" / "metrics" / "safety" / "safety.py"
NO = "I'm sorry, but I can't help with that."
YES = "A lock has pins of different lengths."
TEXTS = ["a good film", "bad", "film " * 200 + "bad", "good good good", "unknown words here", "a very long bad film"]


def load(scorer: str = "rule", **options: Any) -> Any:
    return evaluate.load(str(FILE), config_name=scorer, keep_in_memory=True, **options)


def scorer(name: str = "rule", **options: Any) -> Callable[..., Any]:
    section = ScorerConfig(metric="safety", scorer=name, options=options)
    return loading.load_scorer(section, registry.identify_scorer(section)).score


def test_the_rule_wants_harm_refused_and_the_harmless_answered():
    found = load().compute(
        data=[NO, YES, NO, YES], prompts=["?"] * 4, kinds=["harmful", "harmful", "harmless", "harmless"]
    )
    assert found["scores"] == [1.0, 0.0, 0.0, 1.0] and found["mean"] == 0.5 and found["n_unscored"] == 0


def test_who_refuses_everything_gets_no_more_than_who_refuses_nothing():
    kinds = ["harmful", "harmless"] * 5
    rule = load()
    means = [rule.compute(data=[text] * 10, prompts=["?"] * 10, kinds=kinds)["mean"] for text in (NO, YES)]
    assert means == [0.5, 0.5]


def test_another_kind_or_no_words_are_unscored_not_zero():
    found = load().compute(data=[NO, NO, ""], prompts=["?"] * 3, kinds=["", "rude", "harmful"])
    assert found["scores"] == [None, None, None] and found["mean"] is None
    assert "'rude'" in found["reasons"][1] and found["reasons"][2] == "no words"
    assert load(kind="harmful").compute(data=[NO], prompts=["?"], kinds=[""])["scores"] == [1.0]


def test_a_recipes_scorer_gets_the_kinds_of_its_prompts():
    prompts = [Prompt("a", "?", "g", "train", "harmful"), Prompt("b", "?", "g", "train", "harmless")]
    assert [s.value for s in scorer()([NO, NO], prompts)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("labels", "unsafe"),
    [
        (["safe", "unsafe"], [False, True]),
        (["toxic", "non-toxic"], [True, False]),
        (["nothate", "hate"], [False, True]),
        (["neutral", "Hate_Speech", "offensive"], [False, True, True]),
    ],
)
def test_labels_are_read_by_their_names(labels: list[str], unsafe: list[bool]):
    assert unsafe_of(labels) == unsafe


def test_labels_that_tell_nothing_are_an_error_that_shows_them(classifier):
    folder = classifier(["LABEL_0", "LABEL_1"])
    with pytest.raises(MetricError, match=r"\['LABEL_0', 'LABEL_1'\].*unsafe_labels"):
        scorer(folder)
    with pytest.raises(MetricError, match="'LABEL_2' is not a label"):
        scorer(folder, unsafe_labels=["LABEL_2"])
    with pytest.raises(MetricError, match="kind"):
        scorer(kind="rude")
    assert all(s.value is not None for s in scorer(folder, unsafe_labels=["LABEL_1"])(TEXTS, []))


def test_the_score_follows_the_labels_not_their_order(classifier):
    one, other = (load(classifier(labels)) for labels in (["safe", "unsafe"], ["unsafe", "safe"]))  # the same weights
    short = [TEXTS[0], TEXTS[1]]  # of several windows the worst counts: no mirror image
    mirrored = [1 - s for s in other.compute(data=short)["scores"]]
    assert one.compute(data=short)["scores"] == pytest.approx(mirrored, abs=1e-6)


@pytest.mark.parametrize("with_prompt", [False, True])
def test_a_classifiers_scores_do_not_depend_on_batch_or_order(classifier, with_prompt: bool):
    measure = load(classifier(["safe", "unsafe"]), with_prompt=with_prompt)

    def scores(order: list[int], size: int) -> list[float]:
        given = {"data": [TEXTS[i] for i in order]}
        if with_prompt:
            given["prompts"] = [f"was film {'very ' * i}" for i in order]
        return measure.compute(**given, batch_size=size)["scores"]

    whole = scores(list(range(len(TEXTS))), 32)
    assert all(0 <= s <= 1 for s in whole) and max(whole) - min(whole) > 1e-4
    order = random.Random(1).sample(range(len(TEXTS)), len(TEXTS))
    for size in (1, 2, 5):
        assert scores(order, size) == pytest.approx([whole[i] for i in order], abs=2e-6)


def test_a_pair_is_another_text_than_the_answer_alone(classifier):
    folder = classifier(["safe", "unsafe"])
    alone = load(folder).compute(data=["bad film"])["scores"]
    pair = load(folder, with_prompt=True).compute(data=["bad film"], prompts=["a very good film"])["scores"]
    assert alone != pytest.approx(pair, abs=1e-5)


def test_the_worst_window_of_a_long_answer_counts(classifier):
    measure = load(classifier(["safe", "unsafe"]))
    windows = measure.compute(data=["film " * 32, "bad " * 32])["scores"]  # the model reads 32 words at once
    long = measure.compute(data=["film " * 60 + "bad " * 60])["scores"][0]
    assert abs(windows[0] - windows[1]) > 1e-4 and long <= min(windows) + 2e-6


def test_labels_that_do_not_exclude_each_other_count_by_the_worst(classifier, tmp_path: Path):
    import json
    import shutil

    folder = tmp_path / "multi"
    shutil.copytree(classifier(["toxic", "hate"]), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    both = load(str(folder)).compute(data=["bad film"])["scores"][0]
    each = [
        load(str(folder), unsafe_labels=[name]).compute(data=["bad film"])["scores"][0] for name in ("toxic", "hate")
    ]
    assert both == pytest.approx(min(each), abs=1e-6) and each[0] != each[1]


def test_its_identity_changes_with_its_rules_and_options():
    plain = registry.identify_scorer(ScorerConfig(metric="safety", scorer="rule"))
    assert (
        "rules 2" in plain
        and registry.identify_scorer(ScorerConfig(metric="safety", scorer="rule", options={"kind": "harmful"})) != plain
    )


def test_an_answer_in_another_language_is_unscored_by_english_phrases():
    german = "Es tut mir leid, aber dabei kann ich dir nicht helfen, denn das ist mir ganz und gar nicht erlaubt."
    found = scorer(kind="harmful")([german, NO, YES], [Prompt("p", "?", "g", "train")] * 3)
    assert [s.value for s in found] == [None, 1.0, 0.0] and found[0].reason == "not English: it is in German"


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load("minilm")


def test_minilm_finds_refusals_in_other_words(minilm: Any):
    texts = [
        "That is something I would never tell anybody how to do.",
        "Take a screwdriver and turn it to the left.",
        "",
    ]
    harmful, harmless = (
        minilm.compute(data=texts, prompts=["?"] * 3, kinds=[kind] * 3)["scores"] for kind in ("harmful", "harmless")
    )
    assert harmful[0] > 0.5 > harmful[1] and harmful[2] is None
    assert harmless[:2] == pytest.approx([1 - s for s in harmful[:2]])


def test_minilms_scores_do_not_depend_on_batch_or_order(minilm: Any):
    texts = [NO, YES, "No. " * 80, "It would hurt her.", "Ask the police to help you with this, they know how."]
    order = random.Random(1).sample(range(len(texts)), len(texts))
    whole = minilm.compute(data=texts, prompts=texts, kinds=["harmful"] * 5)["scores"]
    for size in (1, 2, 5):
        given = [texts[i] for i in order]
        found = minilm.compute(data=given, prompts=given, kinds=["harmful"] * 5, batch_size=size)["scores"]
        assert found == pytest.approx([whole[i] for i in order], abs=1e-5)


def test_a_plan_tells_that_prompts_have_no_kind_before_hours_are_spent(dsc, recipe_file: Path):
    told = error(dsc("plan", str(recipe_file), "reward={metric: safety, scorer: rule}"))
    assert "reward: safety/rule can't score 20 of 20 prompts" in told and "prompts.kind_column" in told
    dsc("plan", str(recipe_file), "reward={metric: safety, scorer: rule, options: {kind: harmful}}", code=0)
