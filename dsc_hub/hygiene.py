"""Is a text fit to be kept at all? Asked before the acceptance rule, because small models game every reward at once.

A defect is a short reason that is counted and shown; "" means clean. The detectors are deliberately plain: each can be
read in a line, and each errs on the side of rejecting.
"""

from __future__ import annotations

import re
from collections import Counter

EMPTY = "empty"
CUT = "cut at the length limit"
REPEATS = "repeats itself"
META = "talks about the conversation"
COPIES = "copies the critique"
DEFECTS = (EMPTY, CUT, REPEATS, META, COPIES)

REPEATED_4GRAMS = 0.15  # share above which a text counts as repeating itself
COPIED_8GRAMS = 0.3  # share of the text's 8-grams found in the critique
_META = re.compile(
    r"\b(here(?:'s| is| are)\s+(?:a|an|the|my|some|your)\s+(?:\w+\s+){0,3}(?:version|review|rewrite|revision|response|answer|example|sample|list|points?|text|suggestions?)"
    r"|(?:previous|original|earlier|revised|rewritten|updated|improved|first|above) (?:version|response|answer|review|text|draft|critique)"
    r"|(?:the|your|my) (?:critique|revision|response|rewrite|prompt|instructions?)\b"
    r"|as an ai|language model|i (?:have|'ve) (?:made|rewritten|revised|changed)|i(?:'d| would| will|'ll) (?:rewrite|revise)|to (?:improve|revise|rewrite) (?:the|this|my|your)"
    r"|the (?:review|reviewer|text|writer|author) (?:is|was|does|could|should|seems|describes|mentions|provides|highlights|praises|expresses|captures))",
    re.IGNORECASE,
)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def repeated_share(text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that occurred before in it, 0..1; 0 for texts shorter than n words."""
    words = _words(text)
    grams = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0


def copied_share(text: str, source: str, n: int = 8) -> float:
    """Share of the text's word n-grams that also stand in `source`, 0..1; 0 for texts shorter than n words."""

    def grams(t: str) -> list[tuple[str, ...]]:
        words = _words(t)
        return list(zip(*(words[i:] for i in range(n)), strict=False))

    mine, theirs = grams(text), set(grams(source))
    return sum(g in theirs for g in mine) / len(mine) if mine else 0.0


def defect_of(text: str, finish_reason: str, critique: str = "") -> str:
    """The first reason why the text can't be kept, "" if there is none. `finish_reason` is the server's ("stop", "length")."""
    if not _words(text):
        return EMPTY
    if finish_reason == "length":
        return CUT
    if _META.search(text):
        return META
    if repeated_share(text) >= REPEATED_4GRAMS:
        return REPEATS
    if critique and copied_share(text, critique) >= COPIED_8GRAMS:
        return COPIES
    return ""
