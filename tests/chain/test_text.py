"""Words and runs of words, in scripts with spaces between words and without."""

from __future__ import annotations

import json
import random
import re
import unicodedata

import pytest

from dsc_hub.chain.hygiene import repeats_itself
from dsc_hub.chain.subject import without
from dsc_hub.chain.text import bare, has_name, ngrams, phrases, words
from dsc_hub.metrics.similarity import similarity
from tests.conftest import ROOT

UNSPACED = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "unspaced_texts.jsonl").read_text(encoding="utf-8").splitlines()
]
SAMPLES = {
    "It's a good film - isn't it? 'Yes', he_said; 3.5 stars.": "it's a good film isn't it 'yes' he_said 3 5 stars",
    "Dieser Müßiggang – „schön“.": "dieser müßiggang schön",
    "我喜欢iPhone 15和《千与千寻》。": "我 喜 欢 iphone 15 和 千 与 千 寻",
    "コーヒーが好き。": "コ ー ヒ ー が 好 き",
    "한국어 문장은 띄어 쓴다.": "한국어 문장은 띄어 쓴다",
    "नमस्ते दुनिया, हिन्दी में।": "नमस्ते दुनिया हिन्दी में",
    "এটি একটি বাংলা বাক্য।": "এটি একটি বাংলা বাক্য",
    "วันนี้ดี ๒๕๖๗": "วั น นี้ ดี ๒๕๖๗",
    "မြန်မာ": "မြ န် မာ",
    "می\u200cخواهم بروم": "می\u200cخواهم بروم",
    "de\u0301ja\u0300 vu": "de\u0301ja\u0300 vu",
    "Good \N{HEAVY BLACK HEART}\ufe0f film": "good film",
}


@pytest.mark.parametrize(("text", "expected"), SAMPLES.items())
def test_the_words_of_a_text(text: str, expected: str):
    assert words(text) == expected.split(" ")


def test_a_text_of_chinese_is_counted_by_characters():
    text = "这部电影讲述了一个小镇男孩追逐梦想的故事，导演把平凡的日子拍得温柔而有力。"
    assert len(words(text)) == len(re.findall(r"\w", text)) == 35


def test_the_metric_that_stands_alone_has_the_same_words():
    letters = [chr(c) for c in range(0x20, 0x31000) if unicodedata.category(chr(c))[0] != "C"]
    chance = random.Random(1)
    for text in [*SAMPLES, *(r["text"] for r in UNSPACED), "a".join(letters)]:
        assert similarity.words(text) == words(text)
    for _ in range(300):
        text = "".join(chance.choices(letters, k=30))
        assert similarity.words(text) == words(text)


def test_phrases_are_longer_where_letters_are_words():
    english, chinese, thai = "one two three four".split(), list("我喜欢这部电影"), words("ภาษาไทยนี้ดีมาก")
    assert phrases(english, 3) == ngrams(english, 3) and len(phrases(english, 5)) == 0
    assert phrases(chinese, 3) == [tuple("我喜欢这部电"), tuple("喜欢这部电影")]
    assert {len(p) for p in phrases(thai, 3)} == {9} and len(phrases(thai, 3)) == len(thai) - 8
    assert phrases(["我", "love", "这", "film", "啊"], 2) == [
        ("我", "love", "这"),
        ("love", "这", "film"),
        ("这", "film", "啊"),
    ]


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_what_repeats_itself_in_a_script_without_spaces(language: str):
    texts = [r for r in UNSPACED if r["language"] == language]
    missed = [r["text"] for r in texts if r["repeats"] and not repeats_itself(r["text"])]
    wrongly = [r["text"] for r in texts if not r["repeats"] and repeats_itself(r["text"])]
    # What is missed says one short phrase again and again ("the city at night").
    assert len(texts) >= 12 and len(missed) <= 1 and not wrongly


def test_marks_are_letters_but_accents_are_not():
    assert bare("Amélie’s ΆΛΦΑ Ёлка") == "amelies αλφα елка"
    for one, other in (("की", "का"), ("ป่า", "ป้า"), ("ガ", "カ"), ("한국", "항국")):
        assert bare(one) != bare(other) and without(one, "") != without(other, "")
    assert without("हिन्दी भाषा", "") == ["हिन्दी", "भाषा"]
    assert len(without("대한민국", "")[0]) == 4  # syllables, as people write them


def test_a_name_stands_for_itself_beside_letters_of_an_unspaced_script():
    assert has_name("写一篇关于Jaws的影评", "Jaws") and not has_name("关于Jawsome的影评", "Jaws")
    assert has_name("Review Jaws.", "Jaws") and not has_name("Review Jaws2.", "Jaws")
