"""Pure measures of texts: their words, and runs of them.

A word is letters, digits, underscores and apostrophes together with the marks on them (vowel signs, accents). Scripts
that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) are counted by letters: each
letter with its marks is a word, as BLEU and ROUGE count Chinese. Korean has spaces.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

# Letters of scripts that put no spaces between words, as ranges of a regular expression; their digits are left out,
# which make one number. Of a Chinese or Japanese word two letters are as much as a word of English, of the alphabets
# more.
_IDEOGRAPHS = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3105-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_ALPHABETS = (
    "\u0e01-\u0e4f\u0e80-\u0ecf\u0eda-\u0eff\u0f00-\u0f1f\u0f34-\u0fff\u1000-\u103f\u104a-\u108f\u109a-\u109f\ua9e0-\ua9ef"
    "\ua9fa-\ua9fe\uaa60-\uaa7f\u1780-\u17df"
)
UNSPACED = _IDEOGRAPHS + _ALPHABETS  # for a class of a regular expression
_JOINERS = "\u200c\u200d"  # stand inside words of Persian and of scripts of India
_SPACED_WORD = re.compile(r"[\w']+")
# Where neither marks nor unspaced letters can be: most texts of Europe, with their dashes and quotation marks.
_OTHER = re.compile("[\u0300-\u036f\u0483-\u0489\u0591-\u1fff\u200c\u200d\u20d0-\u20ff\u2ce0-\U0010ffff]")
_IDEOGRAPH, _LETTER = re.compile(f"[{_IDEOGRAPHS}]"), re.compile(f"[{UNSPACED}]")
_ACCENTS = re.compile("[\u0300-\u036f\u0483-\u0487\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20f0\ufe20-\ufe2f]")
# What a word between spaces, an ideograph or kana, and a letter of Thai and its like count in a phrase. Chosen on texts
# in Chinese, Japanese and Thai that repeat themselves and on ones that don't (tests/data/unspaced_texts.jsonl).
WEIGHT, OF_IDEOGRAPH, OF_ALPHABET = 6, 3, 2


def words(text: str) -> list[str]:
    """The text's words in lower case, digits included, punctuation not. Letters of scripts without spaces are words."""
    lowered = text.lower()
    if lowered.isascii() or not _OTHER.search(lowered):
        return _SPACED_WORD.findall(lowered)
    return _any_word().findall(lowered)


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a list of words, in order; none if it has fewer than n words."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def phrases(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a list of words, where a letter of a script without spaces is half a word (Chinese, Japanese) or a
    third (Thai and its like): three characters come again in many a Chinese text, as three words of English don't."""
    if "".join(tokens).isascii() or not any(map(is_unspaced, tokens)):
        return ngrams(tokens, n)
    weights = [_weight(token) for token in tokens]
    out, end, weight = [], 0, 0
    for start in range(len(tokens)):
        while weight < n * WEIGHT and end < len(tokens):
            weight += weights[end]
            end += 1
        if weight < n * WEIGHT:
            break
        out.append(tuple(tokens[start:end]))
        weight -= weights[start]
    return out


def has_name(text: str, name: str) -> bool:
    """Does the name stand in the text, as it is written, and not as a part of a longer word?"""
    letter = r"\w" if text.isascii() else f"[^\\W{UNSPACED}]"
    return re.search(rf"(?<!{letter}){re.escape(name)}(?!{letter})", text) is not None


def is_unspaced(word: str) -> bool:
    """Is the word a letter of a script that puts no spaces between words?"""
    return _LETTER.match(word) is not None


def _weight(word: str) -> int:
    if not is_unspaced(word):
        return WEIGHT
    return OF_IDEOGRAPH if _IDEOGRAPH.match(word) else OF_ALPHABET


def bare(text: str) -> str:
    """The text in lower case, without apostrophes and without accents on Latin, Greek and Cyrillic letters. Marks of
    other scripts are letters to their readers (vowel signs of Hindi, tones of Thai) and stay."""
    if text.isascii():
        return text.lower().replace("'", "")
    plain = unicodedata.normalize("NFKD", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return unicodedata.normalize("NFC", _ACCENTS.sub("", plain).replace("'", ""))


@functools.cache
def _any_word() -> re.Pattern[str]:
    """What makes a word between spaces, with its marks; or one letter of a script without spaces with its marks."""
    spaced, on = f"[^\\W{UNSPACED}]", f"{_marks()}{_JOINERS}"
    return re.compile(f"(?:{spaced}|')(?:{spaced}+|['{on}]+)*|(?=\\w)[{UNSPACED}][{on}]*")


@functools.cache
def _marks() -> str:
    """All combining marks of Unicode, as ranges for a class of a regular expression: `\\w` of `re` has none of them."""
    codes = [c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c)).startswith("M")]
    out: list[list[int]] = []
    for code in [*codes, *range(0xE0100, 0xE01F0)]:
        if out and code == out[-1][1] + 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in out)


def repeated_share(found: Sequence[str], n: int) -> float:
    """Share of a list of words' n-grams that occurred before in it, 0..1; 0 for fewer than n words. In scripts without
    spaces they are as much longer as `text.phrases` makes them."""
    grams = Counter(phrases(found, n))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


def similarity(one: str, other: str) -> float | None:
    """ROUGE-L F1 of two texts' words (characters in scripts without spaces), 0..1: twice their longest common
    subsequence over their lengths together (C.-Y. Lin, 2004). None if both have no words."""
    a, b = words(one), words(other)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else None


def distinct(texts: Sequence[str], n: int, most: int | None = None) -> float | None:
    """Different n-grams over all n-grams of the texts, 0..1 (Li et al., NAACL 2016); of the first `most` if given, since of
    a longer text a smaller share is new. None without any."""
    grams = [g for text in texts for g in ngrams(words(text), n)][:most]
    return len(set(grams)) / len(grams) if grams else None
