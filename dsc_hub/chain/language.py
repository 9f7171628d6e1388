"""In which language is a text? By identification (py3langid), and only where it is sure."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from dsc_hub.chain.text import words

SURE = 0.5  # probability from which a language counts as known: broken or very short texts have none
SURELY = 0.9  # probability from which a text counts as foreign, and is not scored
FEWEST_LETTERS, TIMES = 5, 4  # of another script in a foreign text, and how many of them come on a Latin one
FEWEST_WORDS = 10  # different words that a foreign text has at least
RUN = 3  # words in small letters that follow each other in running text
SHORT_WORDS = 0.25  # share of words of up to three letters: running text of any language has more, lists of names fewer
ENGLISH_WORDS = 2  # different words such as only English has, from which a part of a foreign text may be English
_TRANSLATE = re.compile(r"\b(?:translat|übersetz|tradu)", re.IGNORECASE)
# How languages are called where prompts ask for them; a prompt that names another one than its own is not judged.
_LANGUAGES = {
    "en": "english englisch anglais inglés inglese",
    "de": "german deutsch allemand alemán tedesco",
    "fr": "french französisch français francés francese",
    "es": "spanish spanisch espagnol español spagnolo",
    "it": "italian italienisch italien italiano",
    "pt": "portuguese",
    "nl": "dutch",
    "ru": "russian",
    "zh": "chinese",
    "ja": "japanese",
    "ko": "korean",
    "ar": "arabic",
    "hi": "hindi",
    "tr": "turkish",
    "pl": "polish",
    "sv": "swedish",
    "no": "norwegian",
    "da": "danish",
    "fi": "finnish",
    "el": "greek",
    "he": "hebrew",
    "la": "latin",
    "cs": "czech",
    "hu": "hungarian",
    "ro": "romanian",
    "uk": "ukrainian",
    "vi": "vietnamese",
    "th": "thai",
}
_CODE_OF = {name: code for code, names in _LANGUAGES.items() for name in names.split()}
_ENGLISH = frozenset(  # none of these is a word of another language that is common in print
    "the and that this with from have were been which what when where who whose how why their there they you your she would "
    "could should about into than then these those through because it's don't i'm".split()
)
_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1d00-\u1d25\u1e00-\u1eff]")
_LETTER = re.compile(r"[^\W\d_]")
# What stands between clauses, lines and parts of an address.
_BREAK = re.compile(r"[^\w\s'\N{RIGHT SINGLE QUOTATION MARK}-]|[\d_\n]")


def in_another_language(text: str, prompt: str) -> bool:
    """Is the text in another language than the prompt? Only if both languages are sure (probability >= SURE), and never
    where the prompt asks for a translation or names a language other than its own ("answer in Italian")."""
    theirs, ours = language_of(text), language_of(prompt)
    if not (theirs and ours) or theirs == ours or _TRANSLATE.search(prompt):
        return False
    return all(_CODE_OF.get(word, ours) == ours for word in words(prompt))


def _is_plainly_english(text: str) -> bool:
    """Are a sixth of the words, and three different ones, such as only English has? Ten times as fast as identifying
    the language."""
    found = words(text)
    theirs = [w for w in found if w in _ENGLISH]
    return 6 * len(theirs) >= len(found) and len(set(theirs)) >= 3


@functools.lru_cache(maxsize=4096)
def language_of(text: str) -> str:
    """ISO 639-1 code of the text's language; "" where it is not sure."""
    if _is_plainly_english(text):
        return "en"
    code, probability = _identifier().classify(text)
    return str(code) if probability >= SURE else ""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def foreign(text: str, languages: Sequence[str]) -> str:
    """What shows that a text is surely in none of these languages, for people; "" if it may be in one.

    `languages`: codes of ISO 639-1, of languages in Latin letters. A wrong word here hides a text, so: most letters are
    of another script; or running text (ten different words, in runs of three in small letters, with short ones among
    them, so that neither names nor addresses count) is of another language with a probability of 0.9, and no part is
    English.
    """
    if "en" in languages and _is_plainly_english(text):
        return ""
    if not text.isascii():
        letters = _LETTER.findall(unicodedata.normalize("NFKC", text))
        latin = sum(_LATIN.match(c) is not None for c in letters)
        if len(letters) - latin >= max(FEWEST_LETTERS, TIMES * latin):
            return "in another script"
    running = _running(text)
    if len(set(running)) < FEWEST_WORDS or sum(len(w) <= 3 for w in running) < SHORT_WORDS * len(running):
        return ""
    if "en" in languages and len(_ENGLISH.intersection(words(text))) >= ENGLISH_WORDS:
        return ""
    code, probability = _identifier().classify(" ".join(running))
    return "" if probability < SURELY or code in languages else f"in {language_name(code)}"


def language_name(code: str) -> str:
    """The English name of a language, where it has one here; else its code."""
    return _LANGUAGES[code].split()[0].capitalize() if code in _LANGUAGES else str(code)


def _running(text: str) -> list[str]:
    """The words that follow each other in small letters, at least `RUN` in a row without punctuation."""
    out = []
    for clause in _BREAK.split(text):
        for small, neighbours in itertools.groupby(clause.split(), str.islower):
            run = list(neighbours)
            out += run if small and len(run) >= RUN else []
    return out
