"""Is a text fit to be kept at all? Asked before the acceptance rule, because small models game every reward at once.

A defect is a short reason that is counted and shown; "" means clean. The detectors are deliberately plain: each is a
function of the text that can be read in a line or two, and how often each is right was measured on labelled texts of real
output (`python -m tests.benchmarks.hygiene`; figures in README, "Hygiene").
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
from dsc_hub.config.recipe import HygieneConfig
from dsc_hub.records import Prompt

EMPTY = "empty"
CUT = "cut at the length limit"
LANGUAGE = "in another language"
META = "talks about the conversation"
REPEATS = "repeats itself"
COPIES = "copies the critique"
OFF = "does not name its subject"
DEFECTS = (EMPTY, CUT, LANGUAGE, META, REPEATS, COPIES, OFF)

REPEATED_3GRAMS = HygieneConfig().repeated  # share from which a text counts as repeating itself
REPEATED_PAIR = 0.03  # a pair of longer words that stands three times in the text, for at least this share of its words
COPIED_3GRAMS = 0.3  # share of the text's 3-grams found in the critique
MOST_OPENINGS = 2  # sentences or lines that `strip` may cut off a text
LEAST_LEFT = 4  # words that must be left of it

_WRITING = r"(?:review|rewrite|revision|response|answer|version|draft|critique|edit|text|sentence|statement|essay|summary|paragraph)"
# For texts in lower case, and with what all have in common in front: three times as fast.
_META = re.compile(
    r"\b(?:"
    + "|".join(
        (
            # an earlier or another version of what is being written
            r"(?:previous|original|earlier|revised|rewritten|updated|improved|above) (?:\w+ )?(?:review|rewrite|response|answer|draft|critique|sentence|statement|text)s?\b",
            rf"(?:my|your) (?:\w+ )?(?:prompt|request|instructions?|feedback|{_WRITING})\b",
            rf"here(?:'s| is| are) (?:a|an|the|my|some|your|one|possible) (?:[\w-]+,? ){{0,4}}(?:example|sample|one:|{_WRITING})",
            r"(?:this|the) (?:review|rewrite|revision|critique|edit) (?:is|was|now|should|could|does|focuses|provides|provided|highlights|captures|aims|has been)\b",
            r"(?:this|in (?:a|this)(?: [\w-]+,?(?: and)?){0,3}) (?:review|rewrite|revision|edit)\b|in this (?:question|response|answer)\b",
            # the form that was asked for
            r"in (?:just |only |about )?(?:a few|a couple of|one|two|three|four|five|\d) (?:\w+ ){0,2}(?:sentences?|paragraphs?)\b",
            r"(?:more |entirely |truly )?(?:positive|negative|warm|supportive) (?:critique|critic|criticism|approach|rewording)\b",
            # the writer as an assistant
            r"as an ai\b|as a language model\b|i(?:'m| am) (?:not |only |just )?here to\b|(?:i'm|i am|i'd be) (?:\w+ )?(?:happy|glad|pleased) to (?:help|assist|share|acknowledge|provide|offer|hear)\b",
            r"sorry for (?:any|the) (?:confusion|misunderstanding|inconvenience)\b|(?:can|may) i (?:help|assist) you\b|i don't have the capability\b",
            r"i(?:'ve| have|'d| would| will|'ll)? ?(?:\w+ly |also |just |then )?(?:rewritten|rewrite|revised|revise|rephrase|rephrased|reviewed|praised)\b",
            r"i(?:'ve| have) made (?:a few|some|the following|an?) (?:\w+ )?(?:adjust\w*|changes?|edits?)\b|i (?:did not |did )?cho(?:o)?se to\b",
            r"to (?:improve|revise|rewrite|rephrase) (?:this|my|your) (?:\w+ )?" + _WRITING,
        )
    )
    + ")"
)
# How a text begins that speaks of the task first; `strip` cuts no other sentence off.
_OPENER = re.compile(
    r"\W*(?:(?:sure|certainly|of course|okay|absolutely)\b|here(?:'s| is| are)\b|thank you for (?:the|your) (?:feedback|suggestions?|request)"
    r"|i(?:'ve| have)? (?:re\w+|made|edited)\b|(?:revised|rewritten|updated|improved|new) \w+ ?:|in (?:a few|one|two|three|four|five) \w* ?sentences?\s*:"
    r"|i(?:'m| am) (?:happy|glad|sorry)\b|as an ai\b|my (?:revised |new )?\w+ ?:)",
    re.IGNORECASE,
)
_PLEASANTRY = re.compile(
    r"\W*(?:sure|certainly|of course|okay|absolutely|thank you for (?:the|your) (?:feedback|suggestions?|request))\W*",
    re.IGNORECASE,
)
# A longer word doubled ("bold and bold"), in lower case, and what English does double ("louder and louder", "hours and hours").
_DOUBLED = re.compile(r"\b(\w{5,}+),? (?:and|or) (?:a |the )?\1\b(?!')")
_WELL_DOUBLED = re.compile(
    r"\w+er|again|worse|through|round|(?:hour|year|week|month|mile|time|dozen|hundred|thousand|million|age)s"
)
_PIECE = re.compile(r".*?(?::\s*\n+|:\s+|\n+|[.!?][\"')\]]*\s+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """What hygiene made of a text: `text` is what may be kept, `raw` what it was stripped from ("" if nothing was cut)."""

    text: str
    defect: str
    raw: str = ""


def inspect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneConfig) -> Finding:
    """The first reason why the text can't be kept ("" if there is none), after stripping if the rules say so.

    `finish_reason` is the server's ("stop", "length"); `critique` is what the text was written after ("": none).
    """
    kept = strip_opening(text) if rules.meta_talk == "strip" else text
    return Finding(kept, _defect(kept, finish_reason, prompt, critique, rules), text if kept != text else "")


def _defect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneConfig) -> str:
    if not re.search(r"[\w']", text):
        return EMPTY
    if finish_reason == "length":
        return CUT
    if rules.language == "prompt" and in_another_language(text, prompt.text):
        return LANGUAGE
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
    """Does the text, or a part of it, speak of the task, the request or an earlier version in place of its subject?"""
    return bool(_META.search(text.lower()))


def repeats_itself(text: str, subject: str = "", share: float = REPEATED_3GRAMS) -> bool:
    """Does a reader meet the same phrase again and again? The subject's name may come as often as it likes; `share` is
    that of 3-grams that come again, from which it is too much (0: one is too much; 1: nothing is looked for)."""
    if share >= 1:
        return False
    found = without(text, subject)
    repeated = repeated_share(found, 3)
    return (
        0 < repeated >= share
        or any(not _WELL_DOUBLED.fullmatch(found[1]) for found in _DOUBLED.finditer(text.lower()))
        or _most_frequent_pair(found) >= max(3, REPEATED_PAIR * len(found))
    )


def _most_frequent_pair(found: Sequence[str]) -> int:
    """How often the most frequent pair of neighbouring longer words occurs, shorter words between them left out.
    Scripts without spaces have none, there the longer n-grams must do."""
    longer = [w for w in found if len(w) >= 4] if "".join(found).isascii() else list(filter(_is_longer, found))
    return max(Counter(ngrams(longer, 2)).values(), default=0)


def _is_longer(word: str) -> bool:
    """Four letters, of which a syllable of Korean is two or three."""
    return not is_unspaced(word) and len(unicodedata.normalize("NFD", word)) >= 4


def copies(text: str, critique: str) -> bool:
    """Is the text in good part the critique's own words?"""
    if not critique:
        return False
    mine, theirs = phrases(words(text), 3), set(phrases(words(critique), 3))
    return bool(mine) and sum(g in theirs for g in mine) / len(mine) >= COPIED_3GRAMS


def strip_opening(text: str) -> str:
    """The text without an opening that talks about the task ("Here's a rewritten version:"), if enough is left."""
    rest = text.strip()
    for _ in range(MOST_OPENINGS):
        piece = _PIECE.match(rest)
        if piece is None or not _OPENER.match(piece.group()):
            break
        if not talks_about_the_conversation(piece.group()) and not _PLEASANTRY.fullmatch(piece.group()):
            break
        left = rest[piece.end() :].strip()
        if not phrases(words(left), LEAST_LEFT):
            break
        rest = left
    if rest == text.strip():
        return text
    whole_quote = re.fullmatch(
        '["\N{LEFT DOUBLE QUOTATION MARK}]([^"\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}]+)["\N{RIGHT DOUBLE QUOTATION MARK}]',
        rest,
    )
    return whole_quote.group(1).strip() if whole_quote else rest
