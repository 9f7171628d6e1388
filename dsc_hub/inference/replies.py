"""Replies of OpenAI-compatible servers, validated: what a server sends becomes one of these types, or a BadReply.

Nothing else in the package reads a server's JSON about an answer.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, FiniteFloat, ValidationError

from dsc_hub.system.files import parse_json

MOST_TOKENS = 100_000_000  # a larger count is nonsense
MOST_BYTES = 64 * 2**20  # of one reply
WITHHELD = {"content_filter", "abort", "error"}  # finish_reasons with which a reply may lack a text


class BadReply(ValueError):
    """The reply is not what the route should return. The message says in one line what is wrong."""


def _encodable(value: object) -> object:
    """Replace halves of surrogate pairs, which JSON can hold and UTF-8 can't."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_encodable)]
TokenCount = Annotated[int, Field(ge=0, le=MOST_TOKENS)]


class ReplyMessage(BaseModel):
    """The message of a choice. The thought is in `reasoning_content`, or `reasoning`, or part of `content`."""

    content: Text | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None


class ReplyChoice(BaseModel):
    message: ReplyMessage
    finish_reason: Text | None


class Usage(BaseModel):
    """Token counts: of all messages after the chat template, and of the answer (its thought included)."""

    prompt_tokens: TokenCount
    completion_tokens: TokenCount


class ChatReply(BaseModel):
    """Reply of the route chat/completions."""

    choices: Annotated[list[ReplyChoice], Field(min_length=1)]
    usage: Usage


class Logprob(BaseModel):
    logprob: FiniteFloat


class ScoredPrompt(BaseModel):
    """A choice of the route completions with vLLM's `prompt_logprobs`: one mapping a token, None for the first."""

    prompt_logprobs: list[dict[str, Logprob] | None] | None = None


class ScoredReply(BaseModel):
    """Reply of the route completions; no choices from a server that lacks the route."""

    choices: list[ScoredPrompt] = []


R = TypeVar("R", bound=BaseModel)


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in a reply. BadReply if it is none."""
    try:
        value = parse_json(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise BadReply(f"what is no JSON object: {data[:100]!r}")
    return value


def validate(kind: type[R], value: dict[str, Any]) -> R:
    """Return the reply as its type. BadReply names the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        error = e.errors()[0]
        place = ".".join(map(str, error["loc"]))
        raise BadReply(f"an answer without text or usage: {place}: {error['msg']}") from None


def chat_reply(value: dict[str, Any]) -> ChatReply:
    """Return a chat answer. BadReply if it has neither text nor thought, unless that was withheld."""
    reply = validate(ChatReply, value)
    choice = reply.choices[0]
    is_empty = choice.message.content is None and not (choice.message.reasoning_content or choice.message.reasoning)
    if is_empty and (choice.finish_reason or "").lower() not in WITHHELD:
        raise BadReply("an answer without text or usage: choices.0.message.content is null")
    return reply
