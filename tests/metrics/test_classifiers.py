"""Classifiers and reward models as people have them: labels of all kinds, long texts, one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.errors import MetricError
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.loading import LoadedScorer
from dsc_hub.metrics.privacy.privacy import meanings
from dsc_hub.metrics.safety.safety import unsafe_of
from dsc_hub.metrics.sentiment.sentiment import label_values
from dsc_hub.records import Prompt, Score

TEXTS = ["a good film", "bad", "it was a very very long film and the film was short", "good " * 300, "film " * 90]
Classifier = Callable[..., str]


def loaded(metric: str, folder: str, batch_size: int = 32, **options: Any) -> LoadedScorer:
    section = ScorerConfig(metric=metric, scorer=folder, batch_size=batch_size, options=options)
    return loading.load_scorer(section, registry.identify_scorer(section))


def scores(metric: str, folder: str, texts: Sequence[str], prompt: str = "Say it.", **options: Any) -> list[Score]:
    prompts = [Prompt("p", prompt, "g", "test")] * len(texts)
    return loaded(metric, folder, **options).score(texts, prompts)


def values(*arguments: Any, **options: Any) -> list[float]:
    return [s.value for s in scores(*arguments, **options)]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("labels", "polarities"),
    [
        (["NEGATIVE", "POSITIVE"], [-1, 1]),
        (["pos", "neu", "neg"], [1, 0, -1]),
        (["1 star", "2 stars", "3 stars", "4 stars", "5 stars"], [-1, -0.5, 0, 0.5, 1]),
        (["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"], [-1, -0.5, 0, 0.5, 1]),
        (["very_positive", "positive", "neutral", "negative", "very_negative"], [1, 0.5, 0, -0.5, -1]),
    ],
)
def test_usual_labels_of_sentiment_are_known(labels: list[str], polarities: list[float]):
    assert list(label_values(labels).values()) == polarities


def test_labels_of_any_kind_are_given_values_and_the_scale_is_theirs(classifier: Classifier):
    names = [f"LABEL_{n}" for n in range(5)]
    folder = classifier(names)
    with pytest.raises(MetricError, match=r"option values to \{label: number\} for all"):
        loaded("sentiment", folder)
    scorer = loaded("sentiment", folder, values={name: n + 1 for n, name in enumerate(names)})
    assert scorer.bounds == (1, 5) and scorer.unit == "expected value 1..5 of the labels"
    plain, scaled = (
        values("sentiment", folder, TEXTS, values={name: low + n for n, name in enumerate(names)}) for low in (1, 11)
    )
    assert all(1 <= v <= 5 for v in plain) and [v + 10 for v in plain] == pytest.approx(scaled, abs=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"LABEL_0": -1}, "values has no number for the label 'LABEL_1'"),
        ({"LABEL_0": -1, "LABEL_1": 1, "LABEL_2": 3}, "values: 'LABEL_2' is not a label of the model"),
        ({"LABEL_0": "low", "LABEL_1": 1}, "values should be {label: number}"),
        ({}, "values should be {label: number}"),
    ],
)
def test_values_that_do_not_fit_the_labels_are_an_error(classifier: Classifier, given: dict[str, Any], message: str):
    with pytest.raises(MetricError) as error:
        loaded("sentiment", classifier(["LABEL_0", "LABEL_1"]), values=given)
    assert message in str(error.value)


def test_the_whole_of_a_long_text_counts(classifier: Classifier):
    folder = classifier(["NEGATIVE", "POSITIVE"])  # reads 32 tokens
    good, bad, both = values("sentiment", folder, ["good " * 200, "bad " * 200, "good " * 200 + "bad " * 200])
    assert both == pytest.approx((good + bad) / 2, abs=0.2 * abs(good - bad)) and abs(good - bad) > 0.01
    one, many = (values("sentiment", folder, TEXTS, batch_size=n) for n in (1, 7))
    assert one == pytest.approx(many, abs=1e-5)


def test_a_model_that_names_no_longest_text_is_read_in_windows(classifier: Classifier):
    """As many have it: `model_max_length` of 10^30, and position embeddings for 512 tokens."""
    from transformers import AutoTokenizer

    folder = classifier(["NEGATIVE", "POSITIVE"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    assert -1 <= values("sentiment", folder, ["good film " * 600])[0] <= 1
    assert 0 <= values("safety", folder, ["good film " * 600], unsafe_labels=["NEGATIVE"])[0] <= 1


def test_the_labels_of_models_of_toxicity_are_known():
    six = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
    assert unsafe_of(six) == [True] * 6
    assert unsafe_of(["toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat"]) == [True] * 6


def test_labels_that_all_mean_harm_do_not_exclude_each_other(classifier: Classifier):
    """With a softmax over them every text would be harmful."""
    folder = classifier(["toxic", "severe_toxic", "obscene"])
    assert max(values("safety", folder, TEXTS)) > 0.05


def test_a_prompt_of_any_length_leaves_room_for_the_answer(classifier: Classifier):
    folder = classifier(["SAFE", "TOXIC"])
    texts = ["a good film", "bad bad bad"]
    for prompt in ("was it good", "was it good " * 200):
        read = values("safety", folder, texts, prompt=prompt, with_prompt=True)
        assert len(set(read)) == 2 and all(0 <= v <= 1 for v in read)


@pytest.mark.parametrize(
    ("metric", "options"), [("safety", {"unsafe_labels": ["LABEL_0"]}), ("safety", {}), ("sentiment", {})]
)
def test_one_output_is_no_class(classifier: Classifier, metric: str, options: dict[str, Any]):
    """As unsafe label, the sign of a reward would be upside down."""
    with pytest.raises(MetricError, match="use the metric reward_model"):
        loaded(metric, classifier(["LABEL_0"]), **options)


def test_a_reward_model_reads_prompt_and_answer(classifier: Classifier):
    folder = classifier(["LABEL_0"])
    first = values("reward_model", folder, TEXTS[:3])
    assert len(set(first)) == 3
    assert values("reward_model", folder, TEXTS[:3], prompt="was it short") != pytest.approx(first, abs=1e-4)
    assert values("reward_model", folder, TEXTS[:3], batch_size=1) == pytest.approx(first, abs=1e-4)
    empty, long = scores("reward_model", folder, ["", "good film " * 100])
    assert (empty.reason, long.value) == ("no words", None) and "and the model reads 32" in long.reason
    with pytest.raises(MetricError, match="has one output, this one has"):
        loaded("reward_model", classifier(["NEGATIVE", "POSITIVE"]))
    section = ScorerConfig(metric="reward_model", scorer="default")
    with pytest.raises(MetricError, match=r"Packaged: none; a reward model .* of the Hub is ORG/NAME"):
        registry.identify_scorer(section)


def test_a_reward_model_with_a_template_reads_the_whole_conversation(classifier: Classifier):
    from transformers import AutoTokenizer

    folder = classifier(["LABEL_0"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    scorer = loaded("reward_model", folder)

    def of(first: str) -> float | None:
        turns = [{"role": "user", "content": first}, {"role": "assistant", "content": "good"}]
        turns.append({"role": "user", "content": "was it"})
        return scorer.score(["a film"], [Prompt("p", "was it", "g", "test", "", tuple(turns))])[0].value  # type: ignore[arg-type]

    assert of("very very long") != pytest.approx(of("short"), abs=1e-4)


@pytest.mark.parametrize(
    ("labels", "person", "kinds"),
    [
        (["O", "B-HUM", "I-HUM"], ["B-HUM", "I-HUM"], [None, "person", "person"]),
        (["O", "PER", "EMAIL"], None, [None, "person", "email"]),
    ],
)
def test_labels_of_persons_can_be_named(
    labels: list[str], person: list[str] | None, kinds: list[str | None], tmp_path: Path
):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForTokenClassification, BertConfig, PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *"anna smith saw a film".split()])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    model = AutoModelForTokenClassification.from_config(config)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data.zero_()
    model.classifier.bias.data[1] = 5.0  # each word gets the second label
    model.save_pretrained(tmp_path)
    options = {} if person is None else {"person_labels": person}
    if person is not None:
        assert not any(meanings(labels))
        with pytest.raises(MetricError, match=r"Set person_labels to some of them"):
            loaded("privacy", str(tmp_path), per="text")
        with pytest.raises(MetricError, match="'B-MAN' is not a label of the model"):
            loaded("privacy", str(tmp_path), person_labels=["B-MAN"])
    (found,) = scores("privacy", str(tmp_path), ["anna smith"], per="text", **options)
    assert found.value is not None and found.value < 0


# -- devices


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


@pytest.mark.parametrize(
    ("metric", "labels"),
    [("sentiment", ["NEGATIVE", "POSITIVE"]), ("safety", ["SAFE", "TOXIC"]), ("reward_model", ["LABEL_0"])],
)
@pytest.mark.parametrize(
    ("device", "named"), [("gpu", "device should be cpu, cuda or cuda:N"), ("cuda:0", "PyTorch sees no GPU here")]
)
def test_a_device_that_is_not_there_is_said(classifier, metric: str, labels: list[str], device: str, named: str):
    if device.startswith("cuda") and has_gpu():
        pytest.skip("a GPU is here")
    with pytest.raises(MetricError, match=named):
        loaded(metric, classifier(labels), device=device)


@pytest.mark.parametrize(("metric", "scorer"), [("sentiment", "vader"), ("safety", "rule"), ("privacy", "spacy")])
def test_a_packaged_scorer_has_no_device(metric: str, scorer: str):
    with pytest.raises(MetricError, match=f"{scorer} runs on the CPU"):
        loaded(metric, scorer, device="cuda")


def test_on_a_gpu_the_scores_are_nearly_the_same(classifier):
    if not has_gpu():
        pytest.skip("no GPU")
    folder = classifier(["NEGATIVE", "POSITIVE"])
    assert values("sentiment", folder, TEXTS, device="cuda") == pytest.approx(
        values("sentiment", folder, TEXTS), abs=0.02
    )
