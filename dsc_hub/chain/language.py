"""Language identification of texts (py3langid), used only if it is certain."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from dsc_hub.chain.text import words

SURE = 0.5  # minimum probability of an identified language; broken or very short texts stay below
SURELY = 0.9  # minimum probability to treat a text as foreign, so that it is not scored
FEWEST_LETTERS, TIMES = 5, 4  # minimum letters of another script in a foreign text, in total and per Latin letter
FEWEST_WORDS = 10  # minimum number of different words in a foreign text
LOOKED_AT = 200  # maximum number of prompts whose language is identified
FEWEST_PROMPTS, SAME_LANGUAGE = 3, 0.75  # minimum number, and minimum share in one language, of short foreign prompts
RUN = 3  # minimum length of a sequence of lower-case words in running text
SHORT_WORDS = 0.25  # share of words of up to three letters: running text of any language has more, lists of names less
ENGLISH_WORDS = 2  # number of different English-only words from which part of a foreign text may be English
_TRANSLATE = re.compile(r"\b(?:translat|übersetz|tradu)", re.IGNORECASE)
# Names of languages in prompts; a prompt that names a language other than its own is not judged.
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
    "the and that this with from have were been which what when where who whose how why their there they you your she "
    "would "
    "could should about into than then these those through because it's don't i'm".split()
)
_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1d00-\u1d25\u1e00-\u1eff]")
_LETTER = re.compile(r"[^\W\d_]")
# Separators of clauses, lines and parts of an address.
_BREAK = re.compile(r"[^\w\s'\N{RIGHT SINGLE QUOTATION MARK}-]|[\d_\n]")


def in_another_language(text: str, prompt: str) -> bool:
    """Return whether the text is in another language than the prompt.

    True only if both languages are certain (probability >= SURE), and never if the prompt asks for a translation or
    names a language other than its own ("answer in Italian").
    """
    text_language, prompt_language = language_of(text), language_of(prompt)
    if not (text_language and prompt_language) or text_language == prompt_language or _TRANSLATE.search(prompt):
        return False
    return all(_CODE_OF.get(word, prompt_language) == prompt_language for word in words(prompt))


def _is_plainly_english(text: str) -> bool:
    """Return whether at least a sixth of the words, and three different ones, are English-only words.

    Ten times as fast as language identification.
    """
    all_words = words(text)
    english_words = [w for w in all_words if w in _ENGLISH]
    return 6 * len(english_words) >= len(all_words) and len(set(english_words)) >= 3


@functools.lru_cache(maxsize=4096)
def language_of(text: str) -> str:
    """Return the ISO 639-1 code of the text's language; "" if it is not certain."""
    if _is_plainly_english(text):
        return "en"
    code, probability = _identifier().classify(text)
    return str(code) if probability >= SURE else ""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def foreign(text: str, languages: Sequence[str]) -> str:
    """Return a readable reason why a text is certainly in none of `languages`; "" if it may be in one of them.

    `languages` are ISO 639-1 codes of languages in Latin script. A false positive hides a text, so the conditions are
    strict: most letters are of another script; or the running text is of another language with probability 0.9 and no
    part is English. Running text has ten different words, in sequences of three lower-case words, with short ones among
    them, so that neither names nor addresses count.
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


def foreign_prompts(prompts: Sequence[str], languages: Sequence[str]) -> str:
    """Return how most prompts are certainly in none of `languages` ("in French"); "" if they may be in one of them.

    Looks at `LOOKED_AT` of them, spread evenly, without those that ask for a translation or name a language. They are
    foreign if most of them are by themselves (`foreign`), or, for prompts that are too short for that, if
    SAME_LANGUAGE of them are identified as one other language.
    """
    return _foreign_prompts(tuple(prompts[:: max(1, -(-len(prompts) // LOOKED_AT))]), tuple(languages))


@functools.lru_cache(maxsize=8)  # each scorer of a recipe asks the same
def _foreign_prompts(looked_at: tuple[str, ...], languages: tuple[str, ...]) -> str:
    texts = [p for p in looked_at if not _TRANSLATE.search(p) and not _CODE_OF.keys() & set(words(p))]
    reasons = Counter(reason for text in texts if (reason := foreign(text, languages)))
    if 2 * reasons.total() > len(texts):
        return reasons.most_common(1)[0][0]
    code, count = Counter(map(language_of, texts)).most_common(1)[0] if len(texts) >= FEWEST_PROMPTS else ("", 0)
    return f"in {language_name(code)}" if code and code not in languages and count >= SAME_LANGUAGE * len(texts) else ""


def language_name(code: str) -> str:
    """Return the English name of a language if it is listed here; else its code."""
    return _LANGUAGES[code].split()[0].capitalize() if code in _LANGUAGES else str(code)


def _running(text: str) -> list[str]:
    """Return the words in sequences of at least `RUN` lower-case words without punctuation."""
    out = []
    for clause in _BREAK.split(text):
        for small, neighbours in itertools.groupby(clause.split(), str.islower):
            run = list(neighbours)
            out += run if small and len(run) >= RUN else []
    return out
