"""Prompts that are conversations: read from tables, checked, told apart, and rows of the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsc_hub.chain.chain import opening_of
from dsc_hub.config.sampling import PromptsConfig
from dsc_hub.data import prompts
from dsc_hub.data.conversations import parse_conversation, parse_tools
from dsc_hub.errors import DataError
from dsc_hub.records import Prompt, from_row, prompt_id

TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}


def turns(*texts: str, system: str = "") -> list[dict[str, Any]]:
    """User and assistant by turns."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))]


def loaded(folder: Path, rows: list[dict[str, Any]], name: str = "p.jsonl", **keys: Any) -> list[Prompt]:
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    split = {"train": 0.5, "validation": 0.0, "test": 0.5}
    section = PromptsConfig.model_validate({"path": name, "split": split, "drop_overlaps": False} | keys)
    return prompts.load_prompts(section, folder, 0)[0]


def some(n: int) -> list[dict[str, Any]]:
    return turns(f"What is {n}?", "A number.", f"Which one is after {n}?", system=f"You are teacher {n}.")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_conversation_is_kept_whole_and_its_text_is_the_last_user_turn(tmp_path: Path, name: str):
    rows = loaded(tmp_path, [{"messages": some(n)} for n in range(4)], name, column="messages")
    assert [p.text for p in rows] == [f"Which one is after {n}?" for n in range(4)]
    assert [list(p.messages) for p in rows] == [some(n) for n in range(4)]
    assert [p.system for p in rows] == [f"You are teacher {n}." for n in range(4)]
    assert len({p.id for p in rows}) == 4 and all(p.group == p.id == prompt_id("", p.messages) for p in rows)
    assert all(from_row(Prompt, json.loads(json.dumps(p.as_row()))) == p for p in rows)


def test_one_user_turn_is_a_plain_prompt_and_plain_prompts_stay_what_they_were(tmp_path: Path):
    rows = loaded(tmp_path, [{"prompt": turns(" Say a. ")}, {"prompt": "Say b."}])
    assert rows[0] == Prompt(prompt_id("Say a."), "Say a.", "Say a.", rows[0].split)
    assert prompt_id("Say a.") == "404a758288ada709"
    assert rows[1].as_row().keys() == {"id", "text", "group", "split", "kind"}
    assert prompt_id("", turns("Say a.")) != prompt_id("Say a.")


def test_the_id_of_a_conversation_is_that_of_its_turns_and_tools():
    first = prompt_id("b", turns("a", "x", "b"))
    other = [turns("a", "y", "b"), turns("a", "x", "b", system="s"), turns("a", "x", "b ")]
    assert len({first, *(prompt_id("b", t) for t in other), prompt_id("b", turns("a", "x", "b"), [TOOL])}) == 5
    assert first == prompt_id("other", [dict(reversed(m.items())) for m in turns("a", "x", "b")])


def test_a_system_text_of_its_own_takes_the_place_of_the_recipes(tmp_path: Path):
    own, without, text = loaded(
        tmp_path, [{"prompt": some(1)}, {"prompt": turns("a", "x", "b")}, {"prompt": "Just a text."}]
    )
    assert opening_of(own, "Be kind.") == some(1)
    assert opening_of(without, "Be kind.") == turns("a", "x", "b", system="Be kind.")
    assert opening_of(text, "Be kind.") == turns("Just a text.", system="Be kind.")
    assert opening_of(without, None) == opening_of(without, "") == turns("a", "x", "b")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([], "conversation is empty, expected at least a user turn"),
        (turns("a", "b"), "ends with a turn of assistant, expected user\n  Set prompts.drop_last_answer=true"),
        ([*turns("a", "b"), {"role": "tool", "content": "4"}], "ends with a turn of tool, expected user"),
        ([{"role": "bot", "content": "a"}], "message 1 has the role 'bot', expected one of system, user"),
        ([{"content": "a"}], "message 1 has the role None, expected one of"),
        ([{"from": "alien", "value": "a"}], "message 1 has the role 'alien', expected one of"),
        (["a"], "message 1 should be an object, got str"),
        ([{"role": "user", "content": None}], r"content of message 1 \(user\) is null, expected a text"),
        ([{"role": "user", "content": 3}], r"content of message 1 \(user\) is int, expected a text"),
        ([{"role": "user", "content": " "}], r"message 1 \(user\) has no text"),
        ([*turns("a", ""), *turns("b")], r"message 2 \(assistant\) has no text"),
        ([*turns("a", "b", system="s"), *turns("c", system="s")], "2 system turns, expected one at most"),
        ([*turns("a", "b"), *turns("c", system="s")], "the system turn is message 3, expected the first one"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"content of message 1 \(user\) has a part of the type 'image_url', expected text alone",
        ),
        (
            [*turns("a"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *turns("b")],
            "message 2 calls a tool in a field of its own, expected all that the model wrote in its content",
        ),
    ],
)
def test_what_is_no_conversation_is_told_with_its_row(tmp_path: Path, cell: Any, message: str):
    rows = [{"prompt": some(n)} for n in range(2)]
    with pytest.raises(DataError, match=f"p.jsonl row 3: .*{message}"):
        loaded(tmp_path, [*rows, {"prompt": cell}])
    with pytest.raises(DataError) as error:
        parse_conversation(cell)
    assert error.value.hint


def test_a_cell_that_is_neither_text_nor_a_list_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="row 1: 'prompt' should be text or a list of messages, got null"):
        loaded(tmp_path, [{"prompt": None}])
    with pytest.raises(DataError, match="row 1: 'prompt' should be text or a list of messages, got dict"):
        loaded(tmp_path, [{"prompt": turns("a")[0]}])
    with pytest.raises(DataError, match="half a character"):
        loaded(tmp_path, [{"prompt": turns("\ud800", "x", f"b {n}")} for n in range(2)])


def test_forms_that_datasets_have_are_brought_into_one():
    assert parse_conversation(turns("a", "b", "c", "d"), drop_last_answer=True) == tuple(turns("a", "b", "c"))
    assert parse_conversation(turns("a", "b", "c"), drop_last_answer=True) == tuple(turns("a", "b", "c"))
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert parse_conversation([*shared, shared[1]]) == tuple(turns("a", "b", "a", system="s"))
    parts = [{"type": "text", "text": "one", "image": None}, {"type": "text", "text": "two", "image": None}]
    assert parse_conversation([{"role": "user", "content": parts}]) == tuple(turns("one\ntwo"))
    assert parse_conversation([{"role": "system", "content": ""}, *turns("a")]) == tuple(turns("a"))
    called = [*turns("a", "<call>rain</call>"), {"role": "tool", "content": "", "tool_call_id": "1"}, *turns("b")]
    assert [m["role"] for m in parse_conversation(called)] == ["user", "assistant", "tool", "user"]
    twice = [*turns("a"), *turns("b")]  # the template decides
    assert parse_conversation(twice) == tuple(twice)


def test_in_csv_a_conversation_is_json_and_other_texts_stay_texts(tmp_path: Path):
    cells = [json.dumps(some(1)), "[1, 2, 3]", "[not JSON", "Say a."]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    (tmp_path / "p.csv").write_text("\n".join(["prompt", *quoted]), encoding="utf-8")
    section = PromptsConfig.model_validate({"path": "p.csv", "drop_overlaps": False})
    rows, _ = prompts.load_prompts(section, tmp_path, 0)
    assert [p.transcript for p in rows] == [rows[0].transcript, *cells[1:]] and list(rows[0].messages) == some(1)
    assert rows[0].transcript.startswith("System: You are teacher 1.\n\nUser: What is 1?\n\nAssistant: A number.")
    assert not loaded(tmp_path, [{"prompt": cell} for cell in cells])[0].messages  # JSON lines have lists


@pytest.mark.parametrize("form", ["list", "text"])
def test_tools_are_read_and_part_of_the_prompt(tmp_path: Path, form: str):
    other = {"type": "function", "function": {"name": "sun", "description": "Is it?"}}
    rows = [
        {"prompt": "Rain?", "tools": [TOOL]},
        {"prompt": some(1), "tools": [other]},
        {"prompt": "Sun?", "tools": []},
    ]
    if form == "text":
        rows = [row | {"tools": json.dumps(row["tools"])} for row in rows]
    with_tools, conversation, plain = loaded(tmp_path, rows, tools_column="tools")
    assert with_tools.tools == (TOOL,) and list(with_tools.messages) == turns("Rain?")
    assert with_tools.transcript == with_tools.text == "Rain?" and with_tools.id != prompt_id("Rain?")
    assert conversation.tools == (other,) and (plain.tools, plain.messages) == ((), ())


def test_tools_of_parquet_lose_the_keys_that_other_schemas_have():
    unified = {"type": "function", "function": {"name": "rain", "description": None, "parameters": {"a": None}}}
    assert parse_tools([unified]) == ({"type": "function", "function": {"name": "rain", "parameters": {}}},)
    assert parse_tools(None) == parse_tools("") == parse_tools("[]") == ()


@pytest.mark.parametrize("cell", ["rain", {"name": "rain"}, [{"name": "rain"}], ["rain"], 3, '[{"type": "function"}]'])
def test_what_are_no_tools_is_told(tmp_path: Path, cell: Any):
    with pytest.raises(DataError, match=r"p.jsonl row 1: its tool.*\n  Expected a list of \{type: function"):
        loaded(tmp_path, [{"prompt": "Rain?", "tools": cell}], tools_column="tools")


def test_conversations_that_differ_before_the_last_turn_are_no_duplicates(tmp_path: Path):
    rows = [turns("a", "x", "Go on."), turns("b", "x", "Go on."), turns("a", "x", "go  on."), turns("Go on.")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    section = PromptsConfig.model_validate({"path": "p.jsonl", "drop_overlaps": False})
    found, counts = prompts.load_prompts(section, tmp_path, 0)
    assert len(found) == 3 and counts.duplicates == 1 and len({p.group for p in found}) == 3


def conversation(split: str, *texts: str, system: str = "") -> Prompt:
    messages = tuple(turns(*texts, system=system))
    id_ = prompt_id("", messages)
    return Prompt(id_, texts[-1], id_, split, messages=messages)


def test_a_held_out_conversation_that_repeats_earlier_turns_of_training_is_left_out():
    long = "Tell me at length of the seven wonders of the ancient world."
    train = conversation("train", long, "There were seven.", "And the first?", system="Be brief.")
    copy = conversation("test", long, "Gladly.", "Which is the oldest of them?", system="Be long.")
    alike = conversation("test", "Quite another matter.", "Yes?", "And the first?", system="Be brief.")
    system = " ".join(f"word{n}" for n in range(20))
    shared = [conversation(s, f"Ask {s}", "Yes?", f"End {s}", system=system) for s in ("train", "test")]
    kept, dropped = prompts.without_overlaps([train, copy, alike, *shared])
    assert kept == [train, alike, *shared] and [d.text for d in dropped] == ["Which is the oldest of them?"]


@pytest.mark.parametrize("key", ["tools_column", "drop_last_answer"])
def test_settings_of_conversations_need_a_table(key: str):
    with pytest.raises(ValueError, match=f"{key}: p.txt is read a prompt a line"):
        PromptsConfig.model_validate({"path": "p.txt", key: {"drop_last_answer": True}.get(key, "tools")})
