"""Conversations in cells of tables: check them, and bring them into one form.

A cell is a list of messages {role, content}, as trl, OpenAI and most chat datasets write them, or {from, value}, as
ShareGPT did. Errors say which message is wrong; the caller adds where the row is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsc_hub.errors import DataError
from dsc_hub.records import Message, Tool
from dsc_hub.system.files import parse_json

ROLES = ("system", "user", "assistant", "tool", "function")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # its names of roles; others are the same
MAY_BE_EMPTY = ("tool", "function")
IS_NO_CONVERSATION = "Expected a list of {role, content}, as in the docs' page on conversations."
DROP = "Set prompts.drop_last_answer=true to leave that answer out, or end the conversation before it."


def parse_conversation(cell: Sequence[Any], drop_last_answer: bool = False) -> tuple[Message, ...]:
    """Return the messages of a cell, each {role, content} with a text as content.

    An empty system text counts as none. Of a content in parts the text parts are joined by line breaks; other keys of a
    message (name, ids) are left out. DataError if the cell is no conversation that ends with a user turn.
    """
    messages = [_message(value, f"message {number}") for number, value in enumerate(cell, 1)]
    if drop_last_answer and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages.pop(0)
    if not messages:
        raise DataError("the conversation is empty, expected at least a user turn", "Remove the row.")
    systems = [n for n, m in enumerate(messages, 1) if m["role"] == "system"]
    if len(systems) > 1:
        raise DataError(f"{len(systems)} system turns, expected one at most", "Join their texts in the first message.")
    if systems and systems != [1]:
        raise DataError(f"the system turn is message {systems[0]}, expected the first one", "Move it to the beginning.")
    for number, m in enumerate(messages, 1):
        if not m["content"].strip() and m["role"] not in MAY_BE_EMPTY:
            raise DataError(f"message {number} ({m['role']}) has no text", "Fill it, or remove the row.")
    if (last := messages[-1]["role"]) != "user":
        hint = DROP if last == "assistant" else "The model answers the last user turn: end the conversation with it."
        raise DataError(f"the conversation ends with a turn of {last}, expected user", hint)
    return tuple(messages)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where} should be an object, got {type(value).__name__}", IS_NO_CONVERSATION)
    is_sharegpt = "role" not in value and "from" in value
    role, content = (value.get(key) for key in (("from", "value") if is_sharegpt else ("role", "content")))
    role = SHAREGPT.get(role, role) if is_sharegpt and isinstance(role, str) else role
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise DataError(f"{where} has the role {role!r:.40}, expected one of {known}", f"Rename it to one of {known}.")
    if value.get("tool_calls") or value.get("function_call"):
        raise DataError(
            f"{where} calls a tool in a field of its own, expected all that the model wrote in its content",
            "Write the call into the content in the form that the model's chat template gives it.",
        )
    return {"role": role, "content": _text(content, f"{where} ({role})")}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        got = "null" if content is None else type(content).__name__
        raise DataError(f"the content of {where} is {got}, expected a text", "Fill it, or remove the row.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not (kind == "text" and isinstance(part.get("text"), str)):
            raise DataError(
                f"the content of {where} has a part of the type {kind!r:.40}, expected text alone",
                "dsc works on texts: remove such parts, or such rows.",
            )
        texts.append(part["text"])
    return "\n".join(texts)


def parse_tools(cell: Any) -> tuple[Tool, ...]:
    """Return the tools of a cell: a list of JSON schemas, or its JSON text; () if it is empty or null.

    Keys without a value are left out: Parquet gives each schema the keys of all. DataError if it is none.
    """
    if isinstance(cell, str):
        cell = json_objects(cell.strip())
    if not cell:
        return ()
    form = "Expected a list of {type: function, function: {name, description, parameters}}, or its JSON text."
    if not isinstance(cell, list):
        raise DataError(f"its tools should be a list, got {type(cell).__name__}", form)
    tools = [_without_nulls(tool) for tool in cell]
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise DataError(f"its tool {number} is {json.dumps(tool, default=str)[:60]}", form)
    return tuple(tools)


def json_objects(text: str) -> list[Any] | str:
    """Return the list of objects that a text is the JSON of; any other text as it is."""
    try:
        value = parse_json(text) if text.lstrip().startswith("[") else None
    except ValueError:
        return text
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else text


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
