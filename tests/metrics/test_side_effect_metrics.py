"""The side effects as `evaluate` measurements: by hand, combined, and by a real language model."""

from __future__ import annotations

import math
import random
from typing import Any

import evaluate
import pytest

from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.side_effects.side_effects import SCORERS
from dsc_hub.records import Prompt
from tests.conftest import ROOT

FOLDER = ROOT / "dsc_hub" / "metrics"
TEXTS = ["I'm sorry, I can't help.", "one two one two one", "Here is my revised answer: yes.", "", "word"]


def load(scorer: str, **options: Any) -> Any:
    return evaluate.load(
        str(FOLDER / "side_effects" / "side_effects.py"), config_name=scorer, keep_in_memory=True, **options
    )


@pytest.mark.parametrize(
    ("scorer", "scores", "more_is_better"),
    [
        ("refusal", [1, 0, 0, None, 0], False),
        ("length", [5, 5, 6, None, 1], True),
        ("diversity", [1, 2 / 4, 1, None, None], True),
        ("meta_talk", [0, 0, 1, None, 0], False),
        ("repetition", [0, 1 / 3, 0, None, 0], False),
    ],
)
def test_each_by_hand(scorer: str, scores: list[float | None], more_is_better: bool):
    measure = load(scorer)
    found = measure.compute(data=TEXTS)
    assert found["scores"] == pytest.approx(scores, nan_ok=True) and measure.higher_is_better is more_is_better
    assert found["n_unscored"] == scores.count(None) and found["reasons"][3] == "no words"
    assert found["mean"] == pytest.approx(sum(s for s in scores if s is not None) / (5 - scores.count(None)))


def test_scripts_without_spaces_count_by_characters():
    texts = ["我喜欢这部电影。", "我喜欢这部电影，我喜欢这部电影。", "हिन्दी में"]
    found = {name: load(name).compute(data=texts)["scores"] for name in ("length", "diversity", "repetition")}
    assert found["length"] == [7, 14, 2]
    assert found["diversity"] == pytest.approx([1, 7 / 13, 1])
    assert found["repetition"] == pytest.approx([0, 2 / 9, 0])  # of nine runs of six characters two came before


def test_only_the_english_ones_leave_other_languages_unscored():
    texts = ["我喜欢这部电影。", "I'm sorry, I can't help."]
    for name in SCORERS:
        section = ScorerConfig(metric="side_effects", scorer=name)
        loaded = loading.load_scorer(section, registry.identify_scorer(section), as_measured=True)
        chinese, english = loaded.score(texts, [Prompt("p", "?", "g", "test")] * 2)
        assert english.value is not None
        assert chinese.reason == (name in ("refusal", "meta_talk")) * "not English: it is in another script"


def test_diversity_tells_that_of_all_texts_together():
    assert load("diversity").compute(data=["a b", "a b", "c d"])["across"] == pytest.approx(2 / 3)


def test_evaluate_combine_takes_them():
    both = evaluate.combine([load("length"), load("refusal")])
    found = both.compute(data=TEXTS)
    assert [found[k] for k in found if k.endswith("mean")] == [pytest.approx(17 / 4), pytest.approx(1 / 4)]


def test_as_a_term_of_a_reward_less_counts_with_a_minus():
    section = ScorerConfig(metric="side_effects", scorer="repetition", weight=3.0)
    loaded = loading.load_scorer(section, registry.identify_scorer(section))
    assert [s.value for s in loaded.score(TEXTS[:2], [Prompt("p", "?", "g", "test")] * 2)] == pytest.approx([0, -1])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real causal language model, tiny and random."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lm")
    words = {w: i for i, w in enumerate(["[UNK]", *"one two three four five six".split()])}
    t = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_surprise_is_the_models_own_loss_and_does_not_depend_on_batch_or_order(language_model: str):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["one two three", "six five four three two one two three four five six", "one", "four four", ""]
    measure = load(language_model)
    whole = measure.compute(data=texts)["scores"]
    tokenizer, model = (
        AutoTokenizer.from_pretrained(language_model),
        AutoModelForCausalLM.from_pretrained(language_model),
    )
    for text, score in zip(texts, whole, strict=True):
        if len(text.split()) < 2:
            assert score is None
            continue
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert score == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-5)
    assert max(s for s in whole if s) - min(s for s in whole if s) > 0.01 and all(math.isfinite(s) for s in whole if s)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    for size in (1, 2):
        found = measure.compute(data=[texts[i] for i in order], batch_size=size)["scores"]
        assert [f for f in found] == [None if whole[i] is None else pytest.approx(whole[i], abs=1e-5) for i in order]
