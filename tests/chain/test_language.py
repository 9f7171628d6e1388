"""Which texts are surely foreign to a scorer: none that is English, however broken, short, or full of names."""

from __future__ import annotations

import json

import pytest

from dsc_hub.chain.language import foreign, foreign_prompts
from tests.benchmarks.hygiene import labelled
from tests.conftest import ROOT

RAMPART = ("en", "es", "fr", "de", "it", "pt", "nl")
NAMES = "Anna Schmidt, Bob Müller, Jürgen Groß, Käthe Weiß, Hans Meier, Uwe Bäcker, Fritz Krüger, Lena Vogel, Max Jäger"
FOREIGN = [
    (
        "Dieser Film ist ein wunderbares Werk, und ich habe jede Minute davon sehr genossen, denn er ist gut.",
        "in German",
    ),
    ("Le film raconte l'histoire d'un garçon qui grandit dans une petite ville et qui rêve de la mer.", "in French"),
    ("Ayer hablé con mi hermana y me dijo que quería casarse este verano, lo cual me sorprendió.", "in Spanish"),
    ("Il film racconta la storia di un ragazzo che cresce in una piccola città e sogna il mare.", "in Italian"),
    ("Filmen berättar historien om en pojke som växer upp i en liten stad och drömmer om havet.", "in Swedish"),
    ("Bộ phim kể câu chuyện về một cậu bé lớn lên ở một thị trấn nhỏ và mơ ước thấy biển.", "in Vietnamese"),
    ("Фильм очень хороший.", "in another script"),
    ("我喜欢这部电影，音乐很好听。", "in another script"),
    ("यह फिल्म बहुत अच्छी है।", "in another script"),
    ("ภาพยนตร์เรื่องนี้ดีมาก", "in another script"),
    ("이 영화는 정말 재미있었어요.", "in another script"),
]


@pytest.mark.parametrize(("text", "reason"), FOREIGN)
def test_a_text_in_another_language_is_foreign(text: str, reason: str):
    assert foreign(text, ("en",)) == reason
    may = reason in ("in German", "in French", "in Spanish", "in Italian")
    assert foreign(text, RAMPART) == ("" if may else reason)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Fine.",
        NAMES,
        NAMES.replace(", ", "\n"),
        NAMES.lower(),
        NAMES.lower().replace(", ", "\n"),
        "anna.schmidt@web.de bob.mueller@gmx.de hans.meier@web.de uwe.baecker@t-online.de ina.koehler@gmx.de",
        "Write to Herrn Jürgen Müller, Königsallee 5, 40212 Düsseldorf, or to Frau Käthe Groß, Straße der Einheit 7.",
        "In German one says: der Hund ist groß und die Katze ist klein und das Haus ist alt. That means the dog is big.",
        "movie good very like much actor nice story bad end no like want more see again soon maybe yes",
        "Иван Петров and Анна Сидорова met in Москва with John.",
        "We saw 千与千寻 and 龙猫.",
        "α + β = γ where Δ, Σ, Ω, λ, μ and π are constants",
        "𝐓𝐡𝐢𝐬 𝐢𝐬 𝐚 𝐠𝐫𝐞𝐚𝐭 𝐟𝐢𝐥𝐦",
        "wonderful " * 300,
        "Sehr gut!",  # too short to be sure
    ],
)
def test_what_may_be_english_is_not_foreign(text: str):
    assert foreign(text, ("en",)) == ""


def test_no_english_answer_of_a_small_model_is_foreign():
    data = ROOT / "tests" / "data"
    rows = labelled("held out") + labelled("development")
    english = [r["text"] for r in rows if not r["source"].startswith("foreign") or "language" in r["labels"]]
    for file in ("base_answers.jsonl", "refusals.jsonl"):
        english += [json.loads(line)["text"] for line in (data / file).read_text(encoding="utf-8").splitlines()]
    assert len(english) > 500 and not [t for t in english if foreign(t, ("en",))]
    others = [r["text"] for r in rows if r["source"].startswith("foreign") and "language" not in r["labels"]]
    assert sum(bool(foreign(t, ("en",))) for t in others) >= 14  # of 34, most of them too short or no language at all


FILMS = ("Amélie", "Le Samouraï", "Diva", "Playtime", "Orphée", "Jules et Jim")


@pytest.mark.parametrize(
    ("template", "languages", "reason"),
    [
        ("Écris une critique du film {}.", ("en",), "in French"),
        ("Escribe una reseña de la película {}.", ("en",), "in Spanish"),
        ("Schreibe eine kurze Meldung über einen Brand, den {} gelöscht hat.", ("en",), "in German"),
        ("写一篇关于电影{}的评论", ("en",), "in Chinese"),
        ("Écris une critique du film {}.", ("fr",), ""),
        ("Écris une critique du film {}.", ("en", "fr"), ""),
        ("Write a review of the film {}.", ("en",), ""),
        ("Write a review of the film {}.", ("fr",), "in English"),
        ("Review {}.", ("en",), ""),
        ("{}", ("en",), ""),
    ],
)
def test_prompts_are_foreign_if_they_certainly_are(template: str, languages: tuple[str, ...], reason: str):
    assert foreign_prompts([template.format(film) for film in FILMS], languages) == reason


@pytest.mark.parametrize(
    "template",
    [
        "Translate to English: le film {} est une histoire de famille et de ses secrets dans le sud de la France.",
        "Answer in Italian: what happens in {}?",
    ],
)
def test_prompts_that_ask_for_another_language_are_not_foreign(template: str):
    assert foreign_prompts([template.format(film) for film in FILMS], ("en",)) == ""


def test_prompts_are_looked_at_from_first_to_last():
    french = [f"Écris une critique du film {i}." for i in range(150)]
    english = [f"Write a review of the film {i}." for i in range(249)]
    assert foreign_prompts(french + english, ("en",)) == foreign_prompts(english + french, ("en",)) == ""


def test_prompts_of_several_languages_are_foreign_only_if_most_are_in_one():
    french, english = "Écris une critique du film {}.", "Write a review of the film {}."
    mixed = [(french if i % 2 else english).format(film) for i, film in enumerate(FILMS)]
    assert foreign_prompts(mixed, ("en",)) == "" and foreign_prompts([], ("en",)) == ""


@pytest.mark.parametrize("file", ["quickstart/films.txt", "privacy/events.txt", "safety/prompts.csv"])
def test_no_packaged_prompts_are_foreign(file: str):
    assert foreign_prompts((ROOT / "recipes" / file).read_text().splitlines(), ("en",)) == ""
