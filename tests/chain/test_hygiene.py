"""Hygiene: each detector on texts worked out by hand, and all of them on labelled texts of real output."""

from __future__ import annotations

import pytest

from dsc_hub.chain.hygiene import DEFECTS, copies, inspect, repeats_itself, strip_opening
from dsc_hub.chain.subject import names, subject_of, without
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.records import Prompt
from tests.benchmarks.hygiene import labelled, measure

FILM = Prompt("p", "Write a harsh review of the film Blade Runner, please.", "Blade Runner", "train")
STRICT = HygieneConfig(subject=True)


@pytest.mark.parametrize(
    ("text", "finish", "critique", "reason"),
    [
        ("", "stop", "", "empty"),
        (" ... \n", "stop", "", "empty"),
        ("A fine film", "length", "", "cut at the length limit"),
        ("Dieser Film ist ein wunderbares Werk, und ich habe jede Minute genossen.", "stop", "", "in another language"),
        ("Here's a revised version of the review: it shines.", "stop", "", "talks about the conversation"),
        ("In three sentences, Blade Runner is a marvel.", "stop", "", "talks about the conversation"),
        ("I'm happy to help you with Blade Runner.", "stop", "", "talks about the conversation"),
        ("It was great fun. It was great fun. It was great fun.", "stop", "", "repeats itself"),
        ("Blade Runner is unforgiving and unforgiving.", "stop", "", "repeats itself"),
        (
            "You should praise the lovely music and the acting of all",
            "stop",
            "you should praise the lovely music and the acting of all.",
            "copies the critique",
        ),
        ("A warm film with a clever plot; I would see it again.", "stop", "", "does not name its subject"),
        ("我很喜欢Blade Runner。" * 2, "stop", "我很喜欢Blade Runner。", "in another language"),
        ("BLADE RUNNER: a warm film with a clever plot that gets better and better.", "stop", "", ""),
    ],
)
def test_the_first_reason_is_named(text: str, finish: str, critique: str, reason: str):
    found = inspect(text, finish, FILM, critique, STRICT)
    assert found.defect == reason and (not reason or reason in DEFECTS) and found.text == text


def test_what_a_recipe_allows_is_allowed():
    german = "Dieser Film ist ein wunderbares Werk, und ich habe jede Minute genossen."
    assert inspect(german, "stop", FILM, "", HygieneConfig(language="any")).defect == ""
    translate = Prompt("p", "Translate this into German: I loved every minute of it.", "x", "train")
    assert inspect(german, "stop", translate, "", HygieneConfig()).defect == ""
    assert inspect("A warm film with a clever plot.", "stop", FILM, "", HygieneConfig()).defect == ""


def test_a_subject_is_known_where_the_prompt_names_its_group():
    assert subject_of(FILM) == "Blade Runner"
    assert subject_of(Prompt("p", "Write anything.", "Write anything.", "train")) == ""  # each prompt its own group
    assert (
        subject_of(Prompt("p", "How do I pick a lock?", "crime", "train")) == ""
    )  # a group that is a class, not a name


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42.",
        "The mayor showed a plan to improve the city's roads.",
        "The sentence was life in prison, and the response was swift.",
        "Thank you for meeting with me. I suggest adding basil; feel free to use more.",
        "Little by little it grew louder and louder, for hours and hours.",
        "The musical, and the musical's themes, made her famous.",
    ],
)
def test_ordinary_english_is_clean(text: str):
    assert inspect(text, "stop", FILM, "", HygieneConfig()).defect == ""


def test_each_look_can_be_switched_off():
    off = HygieneConfig(meta_talk="keep", repeated=1, language="any")
    for text in (
        "As an AI, I rewrote my answer.",
        "So good, so good, so good, so good, so good.",
        "Das ist ein sehr guter Film.",
    ):
        assert (
            inspect(text, "stop", FILM, "", off).defect == "" != inspect(text, "stop", FILM, "", HygieneConfig()).defect
        )


@pytest.mark.parametrize(
    ("prompt", "foreign"),
    [
        ("Write a short review of the film Jaws.", True),
        ("Write a short review of the film Jaws in German.", False),
        ("Translate: I have enjoyed every minute of this film.", False),
        ("Schreibe eine kurze Kritik des Films Jaws auf Deutsch.", False),
        ("Écris une courte critique négative du film Jaws en français.", True),
    ],
)
def test_a_prompt_that_asks_for_another_language_is_not_judged(prompt: str, foreign: bool):
    german = "Dieser Film ist ein wunderbares Werk, und ich habe jede Minute genossen."
    found = inspect(german, "stop", Prompt("p", prompt, prompt, "train"), "", HygieneConfig())
    assert (found.defect == "in another language") is foreign


@pytest.mark.parametrize(
    ("text", "subject", "there"),
    [
        ("I saw the sound of music twice.", "The Sound of Music", True),
        ("Amélie is a delight.", "Amelie", True),
        ("Pan\N{RIGHT SINGLE QUOTATION MARK}s Labyrinth glows.", "Pan's Labyrinth", True),
        ("Mad Max is loud.", "Mad Max: Fury Road", True),
        ("I was born in 2001.", "2001: A Space Odyssey", False),
        ("An alienating film.", "Alien", False),
        ("A film about gravity's pull.", "Gravity", False),
        ("Dr Strangelove is a farce.", "Dr. Strangelove", True),
        ("我喜欢千与千寻这部电影。", "千与千寻", True),
        ("The bakery was closed for a week.", "a fire at a bakery", True),
        ("Two bakeries lost their roofs.", "a fire at a bakery", True),
        ("At a school, and at a church.", "a fire at a bakery", False),
        ("The school opened a library.", "the theft of a painting from the town museum", False),
        ("A painting was stolen at the museum.", "the theft of a painting from the town museum", True),
        ("We saw it.", "it", True),
        ("我喜欢X战警这部电影。", "X战警", True),
        ("我喜欢ガ这部电影。", "カ", False),
        ("Смотрели СТАЛКЕР вчера.", "Сталкер", True),
        ("यह की है", "का", False),
    ],
)
def test_a_name_is_found_whatever_its_dress(text: str, subject: str, there: bool):
    assert names(text, subject) is there


def test_a_name_as_often_as_one_likes_is_no_repetition():
    text = "No Country for Old Men is dry. I like No Country for Old Men. See No Country for Old Men at night."
    assert not repeats_itself(text, "No Country for Old Men") and repeats_itself(text)
    assert without("Jaws, Jaws, Jaws!", "Jaws") == ["*", "*", "*"]
    assert without("The film Jaws is fun, Jaws!", "Jaws") == ["film", "*", "is", "fun", "*"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Here's a rewritten version with positive feedback:\n\nJaws is a joy to watch.", "Jaws is a joy to watch."),
        ('Here is my revised review:\n"Jaws is a joy to watch."', "Jaws is a joy to watch."),
        ("Thank you for the feedback. I've revised my answer. Jaws is a joy.", "Jaws is a joy."),
        ("Jaws is a joy. This review is warm.", "Jaws is a joy. This review is warm."),  # not an opening
        ("Here's a rewritten version: Good.", "Here's a rewritten version: Good."),  # too little would be left
        ("Jaws: a joy to watch.", "Jaws: a joy to watch."),
        ("Jaws, in its original version, is a joy. The shark hardly shows.",) * 2,
        ("The answer is 12. Each of the boxes holds four.",) * 2,
        ("Sure! Here's my new answer: Jaws is a joy to watch.", "Jaws is a joy to watch."),
    ],
)
def test_only_an_opening_about_the_task_is_stripped(text: str, left: str):
    assert strip_opening(text) == left


def test_four_characters_are_no_four_words_to_keep():
    assert strip_opening("Here's a new version:\n很好看啊") == "Here's a new version:\n很好看啊"
    assert strip_opening("Here's a new version:\n这部电影非常好看") == "这部电影非常好看"


def test_a_text_in_chinese_copies_phrases_not_characters():
    critique = "请更多地赞美这部电影的音乐和演员的表演。"
    assert copies("我要赞美这部电影的音乐和演员的表演，真好。", critique)
    assert not copies("这部电影的摄影很美，赞美大自然的音乐也和谐。", critique)


def test_a_subject_is_known_in_a_prompt_without_spaces():
    assert subject_of(Prompt("p", "写一篇关于Jaws的影评", "Jaws", "train")) == "Jaws"


def test_what_is_left_after_stripping_is_checked_again():
    rules = HygieneConfig(meta_talk="strip")
    found = inspect("Here's a new version:\nJaws is a joy. Now my answer is positive.", "stop", FILM, "", rules)
    assert (found.defect, found.text[:4]) == ("talks about the conversation", "Jaws") and found.raw.startswith("Here")


@pytest.mark.parametrize(
    ("name", "precision", "recall"),
    # Below what was measured on the held-out half (docs/concepts/hygiene.md), so that a detector that gets worse is seen.
    [("meta", 0.95, 0.6), ("repeats", 0.9, 0.8), ("copies", 0.7, 0.8), ("language", 1.0, 1.0)],
)
def test_the_detectors_are_as_good_as_was_measured(name: str, precision: float, recall: float):
    assert len(labelled("held out")) + len(labelled("development")) == 300
    measured = measure("held out", name)
    assert measured["precision"] >= precision and measured["recall"] >= recall
