"""What a model thinks before it answers: found in the answer of a server, and kept apart from the text.

Models that think write their thoughts before the answer. Servers send them in a field of their own
(`reasoning_content`, `reasoning`), or leave them in the text, in the form of the model's family. A thought is never
part of a text that is scored, shown to the next turn, trained on or evaluated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# (opening, close) of a thought in the text. The chat template may have written the opening into the prompt already.
_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<|channel>thought", "<channel|>"))
# Harmony: <|channel|>analysis<|message|>THOUGHT<|end|>...<|channel|>final<|message|>TEXT
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>")
_OTHER_MARKS = re.compile(r"<\|(?:start|end|return|call|channel|message)\|>")


@dataclass(frozen=True, slots=True)
class ThoughtAndText:
    """A model's answer: the text, and the thought before it ("" without one).

    `is_thinking` says that the thought was not ended, so there is no text.
    """

    text: str
    thought: str = ""
    is_thinking: bool = False


def split_thought(content: str | None, reasoning: str | None = None) -> ThoughtAndText:
    """Return text and thought of a server's answer, whatever form the thought has.

    `content` is the message's text, `reasoning` the field in which some servers send thoughts.
    """
    apart = (reasoning or "").strip()
    if not (content or "").strip():
        return ThoughtAndText("", apart, is_thinking=bool(apart))
    assert content is not None
    split = _harmony(content) or _tagged(content) or ThoughtAndText(content)
    return ThoughtAndText(split.text, "\n".join(filter(None, (apart, split.thought))), split.is_thinking)


def _harmony(content: str) -> ThoughtAndText | None:
    channels = list(_CHANNEL.finditer(content))
    if not channels:
        return None
    ends = [c.start() for c in channels[1:]] + [len(content)]
    parts = [
        (c[1], _OTHER_MARKS.split(content[c.end() : end])[0].strip()) for c, end in zip(channels, ends, strict=True)
    ]
    text = next((part for name, part in reversed(parts) if name == "final"), "")
    thought = "\n".join(part for name, part in parts if name != "final")
    return ThoughtAndText(text, thought, is_thinking=all(name != "final" for name, _ in parts))


def _tagged(content: str) -> ThoughtAndText | None:
    for opening, close in _TAGS:
        begins = content.lstrip().startswith(opening)
        before, mark, after = content.partition(close)
        if mark and (begins or opening not in before):
            return ThoughtAndText(after.strip(), before.replace(opening, "", 1).strip())
        if begins and not mark:
            return ThoughtAndText("", content.lstrip().removeprefix(opening).strip(), is_thinking=True)
    return None
