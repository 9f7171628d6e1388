"""Pure measures of texts: words, n-grams, similarity.

A word consists of letters, digits, underscores and apostrophes, with their combining marks (vowel signs, accents). In
scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each letter with its marks
counts as a word, as BLEU and ROUGE count Chinese. Korean has spaces.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

# Letters of scripts without spaces between words, as ranges of a regular expression. Digits are left out, because
# several digits form one number. About two Chinese or Japanese letters equal an English word; the alphabets need more.
_IDEOGRAPHS = (
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    "\u3105-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_ALPHABETS = (
    "\u0e01-\u0e4f\u0e80-\u0ecf\u0eda-\u0eff\u0f00-\u0f1f\u0f34-\u0fff\u1000-\u103f\u104a-\u108f\u109a-\u109f"
    "\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f\u1780-\u17df"
)
UNSPACED = _IDEOGRAPHS + _ALPHABETS  # for a character class of a regular expression
_JOINERS = "\u200c\u200d"  # occur inside words of Persian and of Indic scripts
_SPACED_WORD = re.compile(r"[\w']+")
# Characters that need the full pattern: without them (most European texts) a text has no marks or unspaced letters.
_OTHER = re.compile("[\u0300-\u036f\u0483-\u0489\u0591-\u1fff\u200c\u200d\u20d0-\u20ff\u2ce0-\U0010ffff]")
_IDEOGRAPH, _LETTER = re.compile(f"[{_IDEOGRAPHS}]"), re.compile(f"[{UNSPACED}]")
_ACCENTS = re.compile("[\u0300-\u036f\u0483-\u0487\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20f0\ufe20-\ufe2f]")
# Weights in a phrase of a word between spaces, of an ideograph or kana, and of a letter of Thai and similar scripts.
# Tuned on repetitive and normal texts in Chinese, Japanese and Thai (tests/data/unspaced_texts.jsonl).
WEIGHT, OF_IDEOGRAPH, OF_ALPHABET = 6, 3, 2


def words(text: str) -> list[str]:
    """Return the text's words in lower case, with digits but no punctuation. Letters of unspaced scripts are words."""
    lowered = text.lower()
    if lowered.isascii() or not _OTHER.search(lowered):
        return _SPACED_WORD.findall(lowered)
    return _any_word().findall(lowered)


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a list of words, in order; none if it has fewer than n words."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def phrases(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a list of words, with letters of unspaced scripts weighted as parts of words.

    A Chinese or Japanese letter counts as half a word, a letter of Thai and similar scripts as a third: three
    characters recur in many Chinese texts, whereas three English words rarely do.
    """
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
    """Return whether the text contains the name exactly as written and not as part of a longer word."""
    letter = r"\w" if text.isascii() else f"[^\\W{UNSPACED}]"
    return re.search(rf"(?<!{letter}){re.escape(name)}(?!{letter})", text) is not None


def is_unspaced(word: str) -> bool:
    """Return whether the word is a letter of a script without spaces between words."""
    return _LETTER.match(word) is not None


def _weight(word: str) -> int:
    if not is_unspaced(word):
        return WEIGHT
    return OF_IDEOGRAPH if _IDEOGRAPH.match(word) else OF_ALPHABET


def bare(text: str) -> str:
    """Return the text in lower case, without apostrophes and without accents on Latin, Greek and Cyrillic letters.

    Marks of other scripts (Hindi vowel signs, Thai tones) distinguish words and are kept.
    """
    if text.isascii():
        return text.lower().replace("'", "")
    plain = unicodedata.normalize("NFKD", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return unicodedata.normalize("NFC", _ACCENTS.sub("", plain).replace("'", ""))


@functools.cache
def _any_word() -> re.Pattern[str]:
    """Return the pattern of a word between spaces, or of one letter of an unspaced script, each with its marks."""
    spaced, on = f"[^\\W{UNSPACED}]", f"{_marks()}{_JOINERS}"
    return re.compile(f"(?:{spaced}|')(?:{spaced}+|['{on}]+)*|(?=\\w)[{UNSPACED}][{on}]*")


@functools.cache
def _marks() -> str:
    """Return all combining marks of Unicode as ranges for a character class: `\\w` of `re` does not match them."""
    codes = [c for c in range(0x300, 0x1F000) if unicodedata.category(chr(c)).startswith("M")]
    out: list[list[int]] = []
    for code in [*codes, *range(0xE0100, 0xE01F0)]:
        if out and code == out[-1][1] + 1:
            out[-1][1] = code
        else:
            out.append([code, code])
    return "".join(f"{chr(a)}-{chr(b)}" for a, b in out)


def repeated_share(found: Sequence[str], n: int) -> float:
    """Return the share of a word list's n-grams that occurred earlier in it, 0..1; 0 for fewer than n words.

    In unspaced scripts the n-grams are longer, see `phrases`.
    """
    grams = Counter(phrases(found, n))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


def similarity(one: str, other: str) -> float | None:
    """Return the ROUGE-L F1 of two texts' words (characters in unspaced scripts), 0..1; None if both have no words.

    It is twice the length of the longest common subsequence over the sum of the lengths (C.-Y. Lin, 2004).
    """
    a, b = words(one), words(other)
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a or b else None


def distinct(texts: Sequence[str], n: int, most: int | None = None) -> float | None:
    """Return distinct n-grams over all n-grams of the texts, 0..1 (Li et al., NAACL 2016); None without n-grams.

    If `most` is given, only the first `most` n-grams count, since the share falls with the length of the text.
    """
    grams = [g for text in texts for g in ngrams(words(text), n)][:most]
    return len(set(grams)) / len(grams) if grams else None
