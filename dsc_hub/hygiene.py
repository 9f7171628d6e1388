"""Is a text fit to be kept at all? Asked before the acceptance rule, because small models game every reward at once.

A defect is a short reason that is counted and shown; "" means clean. The detectors are deliberately plain: each is a
function of the text that can be read in a line or two, and how often each is right was measured on labelled texts of real
output (`python -m tests.benchmarks.hygiene`; figures in README, "Hygiene").
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsc_hub.recipe import HygieneSection
from dsc_hub.records import Prompt

EMPTY = "empty"
CUT = "cut at the length limit"
LANGUAGE = "in another language"
META = "talks about the conversation"
REPEATS = "repeats itself"
COPIES = "copies the critique"
OFF = "does not name its subject"
DEFECTS = (EMPTY, CUT, LANGUAGE, META, REPEATS, COPIES, OFF)

REPEATED_3GRAMS = HygieneSection().repeated  # share from which a text counts as repeating itself
MINUTE = 1e-9  # more than none
REPEATED_PAIR = 0.02  # a pair of longer words that stands three times in the text, for at least this share of its words
COPIED_3GRAMS = 0.3  # share of the text's 3-grams found in the critique
SURE = 0.5  # probability from which a language counts as known: broken or very short texts have none
MOST_OPENINGS = 2  # sentences or lines that `strip` may cut off a text
LEAST_LEFT = 4  # words that must be left of it

_WRITING = r"(?:review|rewrite|revision|response|answer|version|draft|critique|edit|text|sentence|statement|essay|summary|paragraph)"
_META = re.compile(
    "|".join(
        (
            # an earlier or another version of what is being written
            rf"\b(?:previous|original|earlier|revised|rewritten|updated|improved|above) (?:\w+ )?(?:message|{_WRITING})s?\b",
            rf"\b(?:my|your) (?:\w+ )?(?:message|prompt|request|instructions?|feedback|{_WRITING})\b",
            rf"\bhere(?:'s| is| are) (?:a|an|the|my|some|your|one|possible) (?:[\w-]+,? ){{0,4}}(?:example|sample|list|points|suggestions|one:|{_WRITING})",
            rf"\b(?:this|the) {_WRITING} (?:is|was|now|should|could|does|focuses|provides|provided|highlights|captures|aims|has been)\b",
            r"\b(?:this|in (?:a|this)(?: [\w-]+,?(?: and)?){0,3}) (?:review|rewrite|revision|response|answer|edit|question)\b",
            # the form that was asked for
            r"\bin (?:just |only |about )?(?:a few|a couple of|one|two|three|four|five|\d) (?:\w+ ){0,2}(?:sentences?|words|paragraphs?)\b",
            r"\b(?:more |entirely |truly )?(?:positive|negative|warm|balanced|constructive|supportive) (?:critique|critic|feedback|criticism|approach|rewording|tone towards?)\b",
            # the writer as an assistant
            r"\bas an ai\b|\blanguage model\b|\bi(?:'m| am) (?:not |only |just )?here to\b|\b(?:happy|glad|pleased|proud) to (?:help|assist|share|acknowledge|provide|offer|hear)\b",
            r"\bsorry for (?:any|the)\b|\bfeel free to\b|\blet me know\b|\b(?:can|may) i (?:help|assist)\b|\bthank you\b|\bi don't have the capability\b",
            r"\bi(?:'ve| have|'d| would| will|'ll)? ?(?:\w+ly |also |just |then )?(?:rewritten|rewrite|revised|revise|rephrase|rephrased|edited|suggest|reviewed|offered|provided|praised)\b",
            r"\bi(?:'ve| have) (?:made (?:a few|some|the following|an?) (?:\w+ )?(?:adjust\w*|changes?|edits?|points?)|included|mentioned)\b|\bi (?:did not |did )?cho(?:o)?se to\b",
            r"\bto (?:improve|revise|rewrite|rephrase) (?:the|this|my|your)\b|\byou (?:can|could|might|may) (?:offer|consider|rewrite|improve|highlight)\b",
        )
    ),
    re.IGNORECASE,
)
# A longer word doubled ("bold and bold"); what English does double ("again and again") is left alone.
_DOUBLED = re.compile(
    r"\b(?!again|better|worse|deeper|higher|closer|further|round)(\w{5,}),? (?:(?:and|or|of|a|the|by) ){1,2}\1\b",
    re.IGNORECASE,
)
_ABOUT_LANGUAGE = re.compile(
    r"\b(?:translat\w+|(?:in|to|into) (?:english|german|french|spanish|italian|portuguese|dutch|russian|chinese|japanese|korean|arabic"
    r"|hindi|turkish|polish|swedish|norwegian|danish|finnish|greek|hebrew|latin|czech|hungarian|romanian|ukrainian|vietnamese))\b",
    re.IGNORECASE,
)
_PIECE = re.compile(r".*?(?::\s*\n+|:\s+|\n+|[.!?][\"')\]]*\s+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Finding:
    """What hygiene made of a text: `text` is what may be kept, `raw` what it was stripped from ("" if nothing was cut)."""

    text: str
    defect: str
    raw: str = ""


def inspect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneSection) -> Finding:
    """The first reason why the text can't be kept ("" if there is none), after stripping if the rules say so.

    `finish_reason` is the server's ("stop", "length"); `critique` is what the text was written after ("": none).
    """
    kept = strip_opening(text) if rules.meta_talk == "strip" else text
    return Finding(kept, _defect(kept, finish_reason, prompt, critique, rules), text if kept != text else "")


def _defect(text: str, finish_reason: str, prompt: Prompt, critique: str, rules: HygieneSection) -> str:
    if not words(text):
        return EMPTY
    if finish_reason == "length":
        return CUT
    if rules.language == "prompt" and in_another_language(text, prompt.text):
        return LANGUAGE
    if talks_about_the_conversation(text):
        return META
    if repeats_itself(text, subject_of(prompt), rules.repeated):
        return REPEATS
    if copies(text, critique):
        return COPIES
    if rules.subject and (subject := subject_of(prompt)) and not names(text, subject):
        return OFF
    return ""


def words(text: str) -> list[str]:
    """The text's words in lower case; digits count, punctuation does not."""
    return re.findall(r"[\w']+", text.lower())


def ngrams(found: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """The n-grams of a list of words, in order; none if it has fewer than n words."""
    return list(zip(*(found[i:] for i in range(n)), strict=False))


def talks_about_the_conversation(text: str) -> bool:
    """Does the text, or a part of it, speak of the task, the request or an earlier version in place of its subject?"""
    return bool(_META.search(text))


def repeats_itself(text: str, subject: str = "", share: float = REPEATED_3GRAMS) -> bool:
    """Does a reader meet the same phrase again and again? The subject's name may come as often as it likes; `share` is
    that of 3-grams that come again, from which it is too much (0..1; 0: one is too much)."""
    found = without(text, subject)
    return (
        repeated_share(found, 3) >= max(share, MINUTE)
        or bool(_DOUBLED.search(text))
        or _most_frequent_pair(found) >= max(3, REPEATED_PAIR * len(found))
    )


def repeated_share(found: Sequence[str], n: int) -> float:
    """Share of a list of words' n-grams that occurred before in it, 0..1; 0 for fewer than n words."""
    grams = Counter(ngrams(found, n))
    total = grams.total()
    return (total - len(grams)) / total if total else 0.0


def _most_frequent_pair(found: Sequence[str]) -> int:
    """How often the most frequent pair of neighbouring longer words occurs, shorter words between them left out."""
    longer = [w for w in found if len(w) >= 4]
    return max(Counter(ngrams(longer, 2)).values(), default=0)


def copies(text: str, critique: str) -> bool:
    """Is the text in good part the critique's own words?"""
    mine, theirs = ngrams(words(text), 3), set(ngrams(words(critique), 3))
    return bool(mine) and sum(g in theirs for g in mine) / len(mine) >= COPIED_3GRAMS


def in_another_language(text: str, prompt: str) -> bool:
    """Is the text in another language than the prompt? Only if both languages are sure (probability >= SURE), and never
    where the prompt speaks of a language itself ("answer in Italian", "translate")."""
    if _ABOUT_LANGUAGE.search(prompt):
        return False
    theirs, ours = language_of(text), language_of(prompt)
    return bool(theirs and ours) and theirs != ours


@functools.lru_cache(maxsize=4096)
def language_of(text: str) -> str:
    """ISO 639-1 code of the text's language; "" where it is not sure."""
    code, probability = _identifier().classify(text)
    return str(code) if probability >= SURE else ""


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def subject_of(prompt: Prompt) -> str:
    """What the prompt is about, if that is known: its group, where the prompt names it (templates do). "" otherwise."""
    return prompt.group if prompt.group != prompt.text and prompt.group in prompt.text else ""


def names(text: str, subject: str) -> bool:
    """Does the text name the subject? Case, accents, punctuation and a leading article don't matter; of a title with a
    colon ("Name: Second part") the first part is enough."""
    there = f" {' '.join(_plain(text))} "
    wanted = [_plain(subject)] + ([_plain(subject.split(":", maxsplit=1)[0])] if ":" in subject else [])
    return any(w and f" {' '.join(w)} " in there for w in wanted)


def without(text: str, subject: str) -> list[str]:
    """The text's plain words with the subject's name as one mark, so that what is said alike of many subjects shows."""
    found = f" {' '.join(_plain(text))} "
    if name := _plain(subject):
        found = found.replace(f" {' '.join(name)} ", " * ")
    return found.split()


def _plain(text: str) -> list[str]:
    """Words without case, accents and apostrophes, and without a leading article."""
    bare = unicodedata.normalize("NFKD", text.casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    found = re.findall(r"\w+", "".join(c for c in bare if not unicodedata.combining(c)).replace("'", ""))
    return found[1:] if len(found) > 1 and found[0] in ("the", "a", "an") else found


def strip_opening(text: str) -> str:
    """The text without an opening that talks about the task ("Here's a rewritten version:"), if enough is left."""
    rest = text.strip()
    for _ in range(MOST_OPENINGS):
        piece = _PIECE.match(rest)
        if piece is None or not talks_about_the_conversation(piece.group()):
            break
        left = rest[piece.end() :].strip()
        if len(words(left)) < LEAST_LEFT:
            break
        rest = left
    if rest == text.strip():
        return text
    whole_quote = re.fullmatch(r'["\N{LEFT DOUBLE QUOTATION MARK}]([^"]+)["\N{RIGHT DOUBLE QUOTATION MARK}]', rest)
    return whole_quote.group(1).strip() if whole_quote else rest
