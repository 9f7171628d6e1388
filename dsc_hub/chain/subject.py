"""The subject of a prompt, and whether a text names it."""

from __future__ import annotations

import re

from dsc_hub.chain.text import bare, has_name, words
from dsc_hub.records import Prompt

_FUNCTION_WORDS = frozenset(
    "the and for from with without about into onto over under after before between among during through against off out"
    " its his her their our your this that these those are was were has have had not all any some how what why when"
    " where who whom can could should would will does did you they".split()
)


def subject_of(prompt: Prompt) -> str:
    """Return the prompt's subject if it is known: its group, if the prompt names it (templates do). Else ""."""
    text = prompt.transcript
    named = has_name(text, prompt.group) or (not prompt.group.isascii() and prompt.group in text)
    return prompt.group if named and prompt.group != prompt.text else ""


def names(text: str, subject: str) -> bool:
    """Return whether the text names the subject.

    Case, accents, punctuation and a leading article are ignored. Of a title with a colon ("Name: Second part") the
    first part suffices. A description, all in lower case ("a fire at a bakery"), counts as named if the text has half
    of its content words, in any form ("the bakery burned").
    """
    if not re.search(r"[A-Za-z]", bare(subject)) and not subject.isascii():
        return bare(subject) in bare(text)  # scripts without spaces, and languages that inflect names
    if subject == subject.lower() and len(described := _content_words(subject)) > 1:
        text_words = set(_plain_words(text))
        return 2 * sum(any(w.startswith(stem) for w in text_words) for stem in described) >= len(described)
    padded = f" {' '.join(_plain_words(text))} "
    first = subject.split(":", maxsplit=1)[0]
    names_of_subject = [_plain_words(subject)] + (
        [_plain_words(first)] if re.search(r"[^\W\d]", first) else []
    )  # a bare number names nothing
    return any(w and f" {' '.join(w)} " in padded for w in names_of_subject)


def _content_words(description: str) -> set[str]:
    """Return the stems of its content words, so that "flooding" counts as "flood" and "bakeries" as "bakery"."""
    return {w[: max(4, len(w) - 2)] for w in words(bare(description)) if len(w) > 2 and w not in _FUNCTION_WORDS}


def without(text: str, subject: str) -> list[str]:
    """Return the text's plain words with the subject's name replaced by "*", to compare phrases across subjects."""
    plain = " ".join(_plain_words(text))
    if name := _plain_words(subject):
        plain = re.sub(rf"(?<!\S){re.escape(' '.join(name))}(?!\S)", "*", plain)
    return plain.split()


def _plain_words(text: str) -> list[str]:
    """Return the words without case, accents, apostrophes and a leading article."""
    plain = words(bare(text))
    return plain[1:] if len(plain) > 1 and plain[0] in ("the", "a", "an") else plain
