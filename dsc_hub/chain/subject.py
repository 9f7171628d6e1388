"""What a prompt is about, and whether a text names it."""

from __future__ import annotations

import re

from dsc_hub.chain.text import bare, has_name, words
from dsc_hub.records import Prompt

_FUNCTION_WORDS = frozenset(
    "the and for from with without about into onto over under after before between among during through against off out its "
    "his her their our your this that these those are was were has have had not all any some how what why when where who whom "
    "can could should would will does did you they".split()
)


def subject_of(prompt: Prompt) -> str:
    """What the prompt is about, if that is known: its group, where the prompt names it (templates do). "" otherwise."""
    named = has_name(prompt.text, prompt.group) or (not prompt.group.isascii() and prompt.group in prompt.text)
    return prompt.group if named and prompt.group != prompt.text else ""


def names(text: str, subject: str) -> bool:
    """Does the text name the subject? Case, accents, punctuation and a leading article don't matter; of a title with a
    colon ("Name: Second part") the first part is enough. A description, all in lower case ("a fire at a bakery"), is named
    by half of its content words, in whatever form ("the bakery burned")."""
    if not re.search(r"[A-Za-z]", bare(subject)) and not subject.isascii():
        return bare(subject) in bare(text)  # scripts without spaces, and languages that put endings to names
    if subject == subject.lower() and len(described := _content(subject)) > 1:
        said = set(_plain(text))
        return 2 * sum(any(w.startswith(stem) for w in said) for stem in described) >= len(described)
    there = f" {' '.join(_plain(text))} "
    first = subject.split(":", maxsplit=1)[0]
    wanted = [_plain(subject)] + (
        [_plain(first)] if re.search(r"[^\W\d]", first) else []
    )  # a bare number names nothing
    return any(w and f" {' '.join(w)} " in there for w in wanted)


def _content(description: str) -> set[str]:
    """The beginnings of its content words, so that "flooding" counts as "flood" and "bakeries" as "bakery"."""
    return {w[: max(4, len(w) - 2)] for w in words(bare(description)) if len(w) > 2 and w not in _FUNCTION_WORDS}


def without(text: str, subject: str) -> list[str]:
    """The text's plain words with the subject's name as one mark, so that what is said alike of many subjects shows."""
    found = " ".join(_plain(text))
    if name := _plain(subject):
        found = re.sub(rf"(?<!\S){re.escape(' '.join(name))}(?!\S)", "*", found)
    return found.split()


def _plain(text: str) -> list[str]:
    """Words without case, accents and apostrophes, and without a leading article."""
    found = words(bare(text))
    return found[1:] if len(found) > 1 and found[0] in ("the", "a", "an") else found
