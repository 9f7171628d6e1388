"""Notices servers that cut prompts to their context without saying so, by the prompt tokens that they report.

A token holds at most one word, so a prompt has at least as many tokens as words. A conversation that goes on from an
earlier one has that one's tokens too, so that its reported count must have grown by the words that were added. Short
prompts are not checked. A count that is too low is a suspicion, not a proof: some servers leave out what their cache
holds. No I/O.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence

from dsc_hub.records import Message
from dsc_hub.system.hashing import digest

LEAST_WORDS = 256  # of all messages; shorter prompts fit into any context in use
TOKENS_PER_WORD = 0.9  # tokens per word that a tokenizer needs at least (English has 1.3)
MOST_KNOWN = 20_000  # conversations whose count is remembered
_WORD = re.compile(r"[^\W_]+(?=\s|$)")  # one in each run of letters and digits before a space


def word_count(messages: Sequence[Message]) -> int:
    """Return the number of words, separated by spaces, in all messages."""
    return sum(len(_WORD.findall(m["content"])) for m in messages)


class PromptLengths:
    """Remembers the prompt tokens of conversations, to check those that go on from them."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, int] = OrderedDict()

    def least(self, model: str, messages: Sequence[Message], tools: object = None) -> int:
        """Return the least number of prompt tokens that the messages can have; 0 if they are too short to check."""
        total = word_count(messages)
        if total < LEAST_WORDS:
            return 0
        least = int(TOKENS_PER_WORD * total)
        for n in range(len(messages) - 1, 0, -1):
            if (tokens := self._known.get(digest(model, list(messages[:n]), tools))) is not None:
                return max(least, tokens + int(TOKENS_PER_WORD * word_count(messages[n:])))
        return least

    def remember(self, model: str, messages: Sequence[Message], prompt_tokens: int, tools: object = None) -> None:
        """Remember the count of a conversation that was not cut."""
        self._known[digest(model, list(messages), tools)] = prompt_tokens
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)
