"""Replies of servers and the lengths of prompts that they report."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsc_hub.inference.prompt_lengths import LEAST_WORDS, PromptLengths, word_count
from dsc_hub.inference.replies import BadReply, ScoredReply, chat_reply, parse_object, validate


def reply(message: Any = None, usage: Any = None, finish_reason: Any = "stop") -> dict[str, Any]:
    message = {"role": "assistant", "content": "Yes."} if message is None else message
    usage = {"prompt_tokens": 10, "completion_tokens": 2} if usage is None else usage
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage}


@pytest.mark.parametrize(
    "value",
    [
        reply(),
        reply({"content": None, "reasoning_content": "Let me see"}, finish_reason="length"),
        reply({"content": None}, finish_reason="content_filter"),
        reply({"content": ""}),
        reply(finish_reason=None),
        reply(usage={"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 2, "more": {"x": 1}}),
    ],
)
def test_what_servers_send_is_accepted(value: dict[str, Any]):
    assert chat_reply(value).choices[0].message.content == value["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (reply({"content": None}), "choices.0.message.content is null"),
        (reply({"content": None, "tool_calls": []}, finish_reason="tool_calls"), "choices.0.message.content is null"),
        (reply({"content": 5}), "choices.0.message.content"),
        (reply([]), "choices.0.message"),
        (reply(usage={"prompt_tokens": -9, "completion_tokens": 2}), "usage.prompt_tokens"),
        (reply(usage={"prompt_tokens": 9, "completion_tokens": 10**30}), "usage.completion_tokens"),
        (reply(usage={"prompt_tokens": 9, "completion_tokens": float("inf")}), "usage.completion_tokens"),
        (reply(usage={"prompt_tokens": 9, "completion_tokens": 2.5}), "usage.completion_tokens"),
        (reply(usage={"prompt_tokens": 9}), "usage.completion_tokens"),
        (reply(usage=[]), "usage"),
        (reply(finish_reason={}), "choices.0.finish_reason"),
        ({"choices": [], "usage": {}}, "choices"),
        ({"choices": [None], "usage": {}}, "choices.0"),
        ({"error": "none"}, "choices"),
    ],
)
def test_what_is_no_answer_is_told_by_its_place(value: dict[str, Any], place: str):
    with pytest.raises(BadReply, match=f"without text or usage: {place}"):
        chat_reply(value)


def test_half_of_a_surrogate_pair_is_replaced():
    value = parse_object(json.dumps(reply({"content": "a \ud83d b"})).encode())
    assert chat_reply(value).choices[0].message.content == "a ? b"


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{", b'{"a":' + b"[" * 200_000, b"1" * 5000])
def test_what_is_no_object_is_none(data: bytes):
    with pytest.raises(BadReply, match="no JSON object"):
        parse_object(data)


@pytest.mark.parametrize("logprobs", [5, [{"1": {"logprob": None}}], [{"1": 2}], [{"1": {"logprob": float("nan")}}]])
def test_log_probabilities_are_validated(logprobs: Any):
    with pytest.raises(BadReply, match="prompt_logprobs"):
        validate(ScoredReply, {"choices": [{"prompt_logprobs": logprobs}]})


def conversation(*contents: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(contents)]


def test_the_least_length_of_a_prompt():
    lengths, long = PromptLengths(), "word " * 400
    assert lengths.least("m", conversation("word " * (LEAST_WORDS - 1))) == 0
    assert lengths.least("m", conversation(long)) == 360
    lengths.remember("m", conversation(long), 700)
    going_on = conversation(long, "an answer of five words", "another request")
    assert lengths.least("m", going_on) == 700 + int(0.9 * 7)
    assert lengths.least("other", going_on) == int(0.9 * 407)


def test_what_tools_add_to_a_prompt_is_not_expected_of_one_without():
    lengths, turns = PromptLengths(), conversation("word " * 300)
    lengths.remember("m", turns, 2400, tools=[{"type": "function"}])
    going_on = [*turns, *conversation("an answer", "a request")]
    assert lengths.least("m", going_on) < 400
    assert lengths.least("m", going_on, tools=[{"type": "function"}]) > 2400


def test_scripts_without_spaces_and_marks_are_not_overcounted():
    assert word_count(conversation("这是一部很好的电影,我很喜欢它。" * 50)) <= 50
    assert word_count(conversation("-- ** ## \n\n ... !!!")) == 0
    assert word_count(conversation("don't stop, e-mail me")) <= 4
