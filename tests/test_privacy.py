"""The privacy measurement, with its real models, loaded as anybody would load it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import evaluate
import pytest

from dsc_hub import metrics
from dsc_hub.errors import MetricError
from dsc_hub.metrics.privacy.privacy import mentions
from dsc_hub.recipe import Reward
from dsc_hub.records import Prompt
from tests.conftest import ROOT

FILE = ROOT / "dsc_hub" / "metrics" / "privacy" / "privacy.py"
PROMPT = Prompt("p", "Write.", "g", "test")
NAMED = "John Smith met Maria Gonzalez at the bakery. Later John Smith went home."  # 13 words, three mentions
NOBODY = "The owner of the bakery said that a witness had seen the fire before the police came."
DATA = "Write to ann.lee@example.org or call +1 212 555 0142 about card 4111 1111 1111 1111 and 10.0.0.1."
TEXTS = [NAMED, NOBODY, DATA, "Anna Kowalski won.", "", "Nobody was hurt, said the mayor, and Peter Brown agreed."]


def load(scorer: str, file: Path = FILE, **options: Any) -> Any:
    return evaluate.load(str(file), config_name=scorer, keep_in_memory=True, **options)


@pytest.fixture(scope="module", params=["spacy", "presidio", "rampart"])
def measure(request: pytest.FixtureRequest) -> Any:
    return load(request.param)


def test_counts_match_texts_counted_by_hand(measure: Any):
    found = measure.compute(data=[NAMED, NOBODY])
    assert found["found"] == [{"person": ["John Smith", "Maria Gonzalez", "John Smith"]}, {}]
    assert found["scores"] == pytest.approx([100 * 3 / 13, 0.0])
    assert found["mean"] == pytest.approx(100 * 3 / 26) and not measure.higher_is_better


def test_a_text_without_words_is_unscored_not_zero(measure: Any):
    found = measure.compute(data=["", " ... ", NOBODY])
    assert found["scores"] == [None, None, 0.0] and found["reasons"] == ["no words", "no words", ""]
    assert found["n_unscored"] == 2 and measure.compute(data=["?"])["mean"] is None


def test_scores_do_not_depend_on_batch_or_order(measure: Any):
    whole = measure.compute(data=TEXTS)["found"]
    for size in (1, 2):
        assert measure.compute(data=TEXTS, batch_size=size)["found"] == whole
    order = random.Random(1).sample(range(len(TEXTS)), len(TEXTS))
    assert measure.compute(data=[TEXTS[i] for i in order])["found"] == [whole[i] for i in order]


@pytest.mark.parametrize("before", [0, 4, 5, 6, 7, 10, 20, 60, 250])
def test_a_name_is_found_once_wherever_it_stands_in_a_long_text(before: int):
    """18 tokens a sentence, windows of 128 that share 32: the name stands in one, in both, and on the edge of both."""
    text = f"{(NOBODY + ' ') * before}Maria Gonzalez was there. {(NOBODY + ' ') * 40}"
    assert load("rampart").compute(data=[text])["found"] == [{"person": ["Maria Gonzalez"]}]


def test_other_personal_data_is_told_by_kind():
    found = load("presidio").compute(data=[DATA, "IBAN DE89370400440532013000, SSN 536-90-4399."])["found"]
    assert found[0] == {
        "card": ["4111 1111 1111 1111"],
        "email": ["ann.lee@example.org"],
        "ip": ["10.0.0.1"],
        "phone": ["+1 212 555 0142"],
    }
    assert found[1] == {"account": ["DE89370400440532013000"], "id": ["536-90-4399"]}
    few = load("presidio", entities=["card", "person"], per="text").compute(data=[DATA, NAMED])
    assert few["scores"] == [1.0, 3.0]


def test_mentions_are_merged_and_bare():
    text = "Dr. Mary-Ann O'Neil's boss, John  Smith, and Mr Lee"
    spans = [
        (4, 12, "person"),
        (13, 21, "person"),
        (28, 32, "person"),
        (34, 39, "person"),
        (0, 21, "person"),
        (45, 51, "person"),
    ]
    assert mentions(text, spans) == {"person": ["Mary-Ann O'Neil", "John  Smith", "Lee"]}
    assert mentions("a, b", [(0, 1, "person"), (3, 4, "person"), (1, 2, "id")]) == {"person": ["a", "b"]}


@pytest.mark.parametrize(
    ("options", "told"), [({"per": "word"}, "per should be"), ({"entities": ["cats"]}, "'cats' is none of")]
)
def test_wrong_options_are_told(options: dict[str, Any], told: str):
    section = Reward(metric="privacy", scorer="presidio", options=options)
    with pytest.raises(MetricError, match=told):
        metrics.load(section, metrics.identify(section))


def test_as_a_reward_less_is_more():
    section = Reward(metric="privacy", scorer="spacy", options={"per": "text"})
    scorer = metrics.load(section, metrics.identify(section))
    assert [s.value for s in scorer.score([NAMED, NOBODY, ""], [PROMPT] * 3)] == [-3.0, 0.0, None]
    assert scorer.unit == "minus mentions of people per text"


def test_the_file_stands_alone(tmp_path: Path):
    (tmp_path / "names").mkdir()
    shutil.copy(FILE, tmp_path / "names" / "names.py")
    assert load("spacy", tmp_path / "names" / "names.py").compute(data=[NAMED])["scores"] == pytest.approx([300 / 13])


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real token-classification model, tiny: its weights are set so that tokens in capitals carry the second label."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "MARIA", "GONZALEZ", "the", "fire", "was", "there"]

    def make(labels: list[str], name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing(
            "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=200,
        ).save_pretrained(folder)
        config = BertConfig(
            vocab_size=10, hidden_size=16, num_hidden_layers=0, num_attention_heads=1, intermediate_size=16,
            max_position_embeddings=200, id2label=dict(enumerate(labels)), num_labels=len(labels),
        )  # fmt: skip
        model = BertForTokenClassification(config)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
            model.bert.embeddings.LayerNorm.weight.fill_(1)
            model.bert.embeddings.word_embeddings.weight[4:6, 0] = 5
            model.classifier.weight[1, 0] = 1
            model.classifier.bias[0] = 0.1
        model.save_pretrained(folder)
        return str(folder)

    return make


def test_a_model_for_tokens_reads_long_texts_whole_and_batches_alike(tagger: Any):
    measure = load(tagger(["O", "B-PER"], "people"))
    texts = [
        f"{'the fire ' * n}MARIA GONZALEZ was there {'the fire ' * 60}" for n in (0, 46, 47, 48, 62, 63, 64, 200)
    ] + ["the fire"]
    found = [{"person": ["MARIA GONZALEZ"]}] * 8 + [{}]
    for size in (32, 2, 1):
        assert measure.compute(data=texts, batch_size=size)["found"] == found


def test_a_model_without_a_label_for_people_is_refused_and_its_labels_are_shown(tagger: Any):
    section = Reward(metric="privacy", scorer=tagger(["O", "B-LOC"], "places"))
    with pytest.raises(MetricError, match=r"which label means a person(.*)\['O', 'B-LOC'\]"):
        metrics.load(section, metrics.identify(section))
