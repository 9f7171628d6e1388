"""Checks whether a text may be kept at all; applied before the acceptance rule, since small models game every reward.

A defect is a short reason that is counted and displayed; "" means clean. The detectors are deliberately simple: each is
a short function of the text. Their precision and recall were measured on labelled texts of real output (`python -m
tests.benchmarks.hygiene`; figures in docs/concepts/hygiene.md).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsc_hub.chain.language import in_another_language
from dsc_hub.chain.subject import names, subject_of, without
from dsc_hub.chain.text import is_unspaced, ngrams, phrases, repeated_share, words
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.records import Prompt

STOP, LENGTH, THINKING = "stop", "length", "thinking"  # why an answer ended; other words are the server's own
EMPTY = "empty"
CUT = "cut at the length limit"
STILL_THINKING = "still thinking at the length limit"
ENDED_BY_SERVER = "ended by the server"
OTHER_LANGUAGE = "in another language"
META = "talks about the conversation"
REPEATS = "repeats itself"
COPIES = "copies the critique"
OFF = "does not name its subject"
DEFECTS = (EMPTY, CUT, OTHER_LANGUAGE, META, REPEATS, COPIES, OFF)

REPEATED_3GRAMS = HygieneConfig().repeated  # minimum share for which a text counts as repeating itself
META_TALK_LANGUAGES = ("en",)  # of the phrases that talk about the conversation
REPEATED_PAIR = 0.03  # minimum share of the text's words, for a pair of longer words that occurs at least three times
COPIED_3GRAMS = 0.3  # minimum share of the text's 3-grams that also occur in the critique
MOST_OPENINGS = 2  # maximum number of sentences or lines that `strip` removes
LEAST_LEFT = 4  # minimum number of words that must remain

_OPENS, _CLOSES = "\N{LEFT DOUBLE QUOTATION MARK}", "\N{RIGHT DOUBLE QUOTATION MARK}"
_WRITING = (
    r"(?:review|rewrite|revision|response|answer|version|draft|critique|edit|text|sentence|statement|essay|summary"
    r"|paragraph)"
)
# For lower-case texts; the common prefix is factored out, which is three times as fast.
_META = re.compile(
    r"\b(?:"
    + "|".join(
        (
            # an earlier or another version of what is being written
            (
                r"(?:previous|original|earlier|revised|rewritten|updated|improved|above) (?:\w+"
                r" )?(?:review|rewrite|response|answer|draft|critique|sentence|statement|text)s?\b"
            ),
            rf"(?:my|your) (?:\w+ )?(?:prompt|request|instructions?|feedback|{_WRITING})\b",
            (
                r"here(?:'s| is| are) (?:a|an|the|my|some|your|one|possible) (?:[\w-]+,?"
                rf" ){{0,4}}(?:example|sample|one:|{_WRITING})"
            ),
            (
                r"(?:this|the) (?:review|rewrite|revision|critique|edit)"
                r" (?:is|was|now|should|could|does|focuses|provides|provided|highlights|captures|aims|has been)\b"
            ),
            (
                r"(?:this|in (?:a|this)(?: [\w-]+,?(?: and)?){0,3}) (?:review|rewrite|revision|edit)\b|in this"
                r" (?:question|response|answer)\b"
            ),
            # the requested form
            (
                r"in (?:just |only |about )?(?:a few|a couple of|one|two|three|four|five|\d) (?:\w+"
                r" ){0,2}(?:sentences?|paragraphs?)\b"
            ),
            (
                r"(?:more |entirely |truly )?(?:positive|negative|warm|supportive)"
                r" (?:critique|critic|criticism|approach|rewording)\b"
            ),
            # the writer as an assistant
            (
                r"as an ai\b|as a language model\b|i(?:'m| am) (?:not |only |just )?here to\b|(?:i'm|i am|i'd be)"
                r" (?:\w+ )?(?:happy|glad|pleased) to (?:help|assist|share|acknowledge|provide|offer|hear)\b"
            ),
            (
                r"sorry for (?:any|the) (?:confusion|misunderstanding|inconvenience)\b|(?:can|may) i (?:help|assist)"
                r" you\b|i don't have the capability\b"
            ),
            (
                r"i(?:'ve| have|'d| would| will|'ll)? ?(?:\w+ly |also |just |then"
                r" )?(?:rewritten|rewrite|revised|revise|rephrase|rephrased|reviewed|praised)\b"
            ),
            (
                r"i(?:'ve| have) made (?:a few|some|the following|an?) (?:\w+ )?(?:adjust\w*|changes?|edits?)\b|i"
                r" (?:did not |did )?cho(?:o)?se to\b"
            ),
            r"to (?:improve|revise|rewrite|rephrase) (?:this|my|your) (?:\w+ )?" + _WRITING,
        )
    )
    + ")"
)
# Openings that talk about the task; `strip` removes no other sentences.
_OPENER = re.compile(
    r"\W*(?:(?:sure|certainly|of course|okay|absolutely)\b|here(?:'s| is| are)\b|thank you for (?:the|your)"
    r" (?:feedback|suggestions?|request)"
    r"|i(?:'ve| have)? (?:re\w+|made|edited)\b|(?:revised|rewritten|updated|improved|new) \w+ ?:|in (?:a"
    r" few|one|two|three|four|five) \w* ?sentences?\s*:"
    r"|i(?:'m| am) (?:happy|glad|sorry)\b|as an ai\b|my (?:revised |new )?\w+ ?:)",
    re.IGNORECASE,
)
_PLEASANTRY = re.compile(
    r"\W*(?:sure|certainly|of course|okay|absolutely|thank you for (?:the|your) (?:feedback|suggestions?|request))\W*",
    re.IGNORECASE,
)
# A repeated longer word ("bold and bold"), in lower case, and repetitions usual in English ("louder and louder", "hours
# and hours").
_DOUBLED = re.compile(r"\b(\w{5,}+),? (?:and|or) (?:a |the )?\1\b(?!')")
_WELL_DOUBLED = re.compile(
    r"\w+er|again|worse|through|round|(?:hour|year|week|month|mile|time|dozen|hundred|thousand|million|age)s"
)
_PIECE = re.compile(r".*?(?::\s*\n+|:\s+|\n+|[.!?][\"')\]]*\s+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of the check: `text` is the text to keep, `raw` the text before stripping ("" if nothing was removed)."""

    text: str
    defect: str
    raw: str = ""


def inspect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneConfig) -> Finding:
    """Return the first defect of the text ("" if there is none), after stripping if the rules say so.

    `finish_reason` is that of a Completion; `critique` is the critique that the text answers ("": none).
    """
    kept = strip_opening(text) if rules.meta_talk == "strip" else text
    return Finding(kept, _defect(kept, finish_reason, prompt, critique, rules), text if kept != text else "")


def _defect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneConfig) -> str:
    if finish_reason == THINKING:
        return STILL_THINKING
    if finish_reason not in (STOP, LENGTH):
        return f"{ENDED_BY_SERVER}: {finish_reason or 'no reason given'}"
    if not re.search(r"[\w']", text):
        return EMPTY
    if finish_reason == LENGTH:
        return CUT
    if rules.language == "prompt" and in_another_language(text, prompt.text):
        return OTHER_LANGUAGE
    if rules.meta_talk != "keep" and talks_about_the_conversation(text):
        return META
    if repeats_itself(text, subject_of(prompt), rules.repeated):
        return REPEATS
    if copies(text, critique):
        return COPIES
    if rules.subject and (subject := subject_of(prompt)) and not names(text, subject):
        return OFF
    return ""


def talks_about_the_conversation(text: str) -> bool:
    """Return whether the text, or a part of it, is about the task, the request or an earlier version."""
    return bool(_META.search(text.lower()))


def repeats_itself(text: str, subject: str = "", share: float = REPEATED_3GRAMS) -> bool:
    """Return whether the text repeats the same phrases. The subject's name may occur any number of times.

    `share` is the share of repeated 3-grams that is too much (0: a single one is too much; 1: no check).
    """
    if share >= 1:
        return False
    remaining = without(text, subject)
    repeated = repeated_share(remaining, 3)
    return (
        0 < repeated >= share
        or any(not _WELL_DOUBLED.fullmatch(match[1]) for match in _DOUBLED.finditer(text.lower()))
        or _most_frequent_pair(remaining) >= max(3, REPEATED_PAIR * len(remaining))
    )


def _most_frequent_pair(found: Sequence[str]) -> int:
    """Return the count of the most frequent pair of neighbouring longer words, with shorter words left out.

    Scripts without spaces have no such pairs; for them the longer n-grams must suffice.
    """
    longer_words = [w for w in found if len(w) >= 4] if "".join(found).isascii() else list(filter(_is_longer, found))
    return max(Counter(ngrams(longer_words, 2)).values(), default=0)


def _is_longer(word: str) -> bool:
    """Return whether the word has four letters or more; a Korean syllable counts as two or three."""
    return not is_unspaced(word) and len(unicodedata.normalize("NFD", word)) >= 4


def copies(text: str, critique: str) -> bool:
    """Return whether a large part of the text is copied from the critique."""
    if not critique:
        return False
    text_phrases, critique_phrases = phrases(words(text), 3), set(phrases(words(critique), 3))
    return bool(text_phrases) and sum(g in critique_phrases for g in text_phrases) / len(text_phrases) >= COPIED_3GRAMS


def strip_opening(text: str) -> str:
    """Return the text without an opening that talks about the task ("Here's a rewritten version:").

    The text is returned unchanged if too little would remain.
    """
    rest = text.strip()
    for _ in range(MOST_OPENINGS):
        piece = _PIECE.match(rest)
        if piece is None or not _OPENER.match(piece.group()):
            break
        if not talks_about_the_conversation(piece.group()) and not _PLEASANTRY.fullmatch(piece.group()):
            break
        remainder = rest[piece.end() :].strip()
        if not phrases(words(remainder), LEAST_LEFT):
            break
        rest = remainder
    if rest == text.strip():
        return text
    whole_quote = re.fullmatch(
        f'["{_OPENS}]([^"{_OPENS}{_CLOSES}]+)["{_CLOSES}]',
        rest,
    )
    return whole_quote.group(1).strip() if whole_quote else rest
