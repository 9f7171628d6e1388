"""The sentiment measurement, loaded as anybody would load it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import evaluate
import pytest

from dsc_hub.config.sampling import RewardConfig, ScorerConfig
from dsc_hub.errors import MetricError
from dsc_hub.metrics import loading, registry
from dsc_hub.records import Prompt, Score
from tests.conftest import ROOT

FOLDER = str(ROOT / "dsc_hub" / "metrics" / "sentiment")


def load(scorer: str, **keys: object) -> Callable[[Sequence[str]], list[Score]]:
    section = RewardConfig(scorer=scorer, **keys)
    loaded = loading.load_scorer(section, registry.identify_scorer(section))
    return lambda texts: loaded.score(texts, [Prompt("p", "Write.", "g", "test")] * len(texts))


def test_evaluate_load_takes_the_folder_and_scores_by_sentence():
    measure = evaluate.load(FOLDER, config_name="vader", keep_in_memory=True)
    result = measure.compute(data=["I love it. I hate it.", "I love it.", "I hate it."])
    mixed, good, bad = result["scores"]
    assert mixed == pytest.approx((good + bad) / 2) and good == pytest.approx(0.6369) and bad == pytest.approx(-0.5719)
    assert result["n_unscored"] == 0 and result["mean"] == pytest.approx(sum(result["scores"]) / 3)


def test_vader_is_the_default_of_evaluate_load():
    assert evaluate.load(FOLDER, keep_in_memory=True).compute(data=["I love it."])["scores"] == pytest.approx([0.6369])


@pytest.mark.parametrize("scorer", ["vader", "textblob"])
def test_an_empty_text_is_unscored_not_neutral(scorer: str):
    scores = load(scorer)(["", " ... ", "A wonderful film."])
    assert scores[:2] == [Score(None, "no words")] * 2 and scores[2].value > 0.3
    assert load(scorer)([]) == []


GERMAN = "Dieser Film ist ein wunderbares Werk, und ich habe jede Minute davon sehr genossen, denn er ist gut."


@pytest.mark.parametrize("scorer", ["vader", "textblob"])
def test_a_text_in_another_language_is_unscored_not_neutral(scorer: str):
    texts = ["A wonderful film.", GERMAN, "A terrible film.", "我喜欢这部电影。"]
    good, german, bad, chinese = load(scorer)(texts)
    assert good.value > 0.3 > -0.3 > bad.value
    assert german == Score(None, "not English: it is in German")
    assert chinese == Score(None, "not English: it is in another script")
    assert load(scorer)([GERMAN]) == [german]


def test_the_language_of_other_scorers_is_not_judged(classifier):
    assert all(s.value is not None for s in load(classifier(["NEGATIVE", "POSITIVE"]))([GERMAN, "我喜欢这部电影。"]))


def test_the_languages_are_those_of_packaged_scorers():
    for name, shipped in registry.SHIPPED.items():
        assert set(shipped.languages) <= set(shipped.scorers), name
    german = "Frau Käthe Groß wohnt jetzt mit ihrer Familie in der Stadt, und sie arbeitet dort sehr gern."
    for scorer, reason in (("spacy", "not English: it is in German"), ("rampart", "")):
        section = ScorerConfig(metric="privacy", scorer=scorer)
        found = loading.load_scorer(section, registry.identify_scorer(section)).score(
            [german], [Prompt("p", "?", "g", "test")]
        )
        assert found[0].reason == reason


def test_nothing_to_score_has_no_mean():
    assert evaluate.load(FOLDER, keep_in_memory=True).compute(data=["", "?"])["mean"] is None


TEXTS = [
    "a good film",
    "bad",
    "it was a very very long film and the film was short",
    "good good good",
    "film " * 200,
    "unknown words here",
]


@pytest.mark.parametrize(
    "labels",
    [
        ["NEGATIVE", "POSITIVE"],
        ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"],
        ["LABEL_0", "LABEL_1"],
        ["positive", "neutral", "negative"],
    ],
)
def test_a_classifiers_scores_do_not_depend_on_batch_or_order(classifier, labels: list[str]):
    folder = classifier(labels)
    one = [s.value for s in load(folder, batch_size=1)(TEXTS)]
    many = [s.value for s in load(folder, batch_size=4)(TEXTS)]
    back = [s.value for s in load(folder, batch_size=4)(TEXTS[::-1])][::-1]
    assert one == pytest.approx(many, abs=1e-5) and one == pytest.approx(back, abs=1e-5)
    assert all(-1 <= v <= 1 for v in one) and max(one) - min(one) > 0.01


def test_the_polarity_follows_the_labels_not_their_order(classifier):
    up, down = classifier(["NEGATIVE", "POSITIVE"]), classifier(["POSITIVE", "NEGATIVE"])  # the same weights
    assert [s.value for s in load(up)(TEXTS)] == pytest.approx([-s.value for s in load(down)(TEXTS)], abs=1e-6)


def test_labels_that_tell_nothing_are_an_error_that_shows_them(classifier):
    folder = classifier(["joy", "anger", "fear"])
    with pytest.raises(MetricError, match=r"\['joy', 'anger', 'fear'\].*positive_label"):
        load(folder)
    with pytest.raises(MetricError, match="'jov' is not a label"):
        load(folder, positive_label="jov")
    assert all(s.value is not None for s in load(folder, positive_label="joy")(TEXTS))


def test_a_scorer_that_is_nowhere_is_an_error(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MetricError, match="can't be loaded"):
        load(str(tmp_path / "empty"))
