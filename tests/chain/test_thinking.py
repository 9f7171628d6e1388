"""Thoughts of models, in each form that servers send them, are kept apart from the text."""

from __future__ import annotations

import pytest

from dsc_hub.chain.hygiene import ENDED_BY_SERVER, STILL_THINKING, inspect
from dsc_hub.chain.thinking import ThoughtAndText, split_thought
from dsc_hub.config.sampling import HygieneConfig
from dsc_hub.records import Prompt

TEXT, THOUGHT = "The film is warm.", "The user wants a review.\nI praise it."
HARMONY = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}<|return|>"


@pytest.mark.parametrize(
    ("content", "reasoning"),
    [
        (f"<think>{THOUGHT}</think>{TEXT}", None),
        (f"\n<think>\n{THOUGHT}\n</think>\n\n{TEXT}", None),
        (f"{THOUGHT}\n</think>\n\n{TEXT}", None),  # the template wrote <think> into the prompt
        (f"<thinking>{THOUGHT}</thinking> {TEXT}", None),
        (f"<|channel>thought\n{THOUGHT}<channel|>{TEXT}", None),
        (TEXT, THOUGHT),  # reasoning_content
        (HARMONY, None),
    ],
)
def test_text_and_thought_are_told_apart(content: str, reasoning: str | None):
    assert split_thought(content, reasoning) == ThoughtAndText(TEXT, THOUGHT)


@pytest.mark.parametrize(
    ("content", "reasoning"),
    [
        (f"<think>{THOUGHT}", None),
        (None, THOUGHT),  # content is null until the thinking ends
        ("", THOUGHT),
        (f"<|channel>thought\n{THOUGHT}", None),
        (f"<|channel|>analysis<|message|>{THOUGHT}", None),
    ],
)
def test_a_thought_that_does_not_end_leaves_no_text(content: str | None, reasoning: str | None):
    assert split_thought(content, reasoning) == ThoughtAndText("", THOUGHT, is_thinking=True)


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        "  two\n\n  lines kept as they are \n",
        "In HTML, <b> is bold.",
        "He wrote <think> in the margin, and went on.",  # not at the beginning, and not ended
        "x < y and y > z",
    ],
)
def test_other_texts_stay_as_they_are(content: str):
    assert split_thought(content) == ThoughtAndText(content)


def test_an_empty_thought_leaves_the_text():
    assert split_thought(f"<think>\n\n</think>\n\n{TEXT}") == ThoughtAndText(TEXT, "")
    assert split_thought(None) == ThoughtAndText("") and split_thought("") == ThoughtAndText("")


PROMPT = Prompt("p", "Review the film.", "film", "train")


@pytest.mark.parametrize(
    ("reason", "text", "defect"),
    [
        ("thinking", "", STILL_THINKING),
        ("content_filter", TEXT, f"{ENDED_BY_SERVER}: content_filter"),
        ("tool_calls", TEXT, f"{ENDED_BY_SERVER}: tool_calls"),
        ("", TEXT, f"{ENDED_BY_SERVER}: no reason given"),
        ("stop", TEXT, ""),
    ],
)
def test_only_an_answer_that_the_model_ended_is_clean(reason: str, text: str, defect: str):
    assert inspect(text, reason, PROMPT, "", HygieneConfig(language="any")).defect == defect
