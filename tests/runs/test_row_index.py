"""Rows by their keys: exact, in order, from many files, and without the rows in memory."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from dsc_hub.errors import RunError
from dsc_hub.records import Prompt, Turn, id_as_uint64, prompt_id
from dsc_hub.runs.jsonl import JsonlFile
from dsc_hub.runs.row_index import OrderedRows, RowIndex, StoredPrompts, chain_key, request_key, turn_key


def written(path: Path, rows: list[dict]) -> JsonlFile:
    file = JsonlFile(path)
    for row in rows:
        file.append(row)
    file.close()
    return file


def chain(i: int, number: int, **more: object) -> dict:
    return {"prompt_id": prompt_id(f"p{i}"), "number": number, **more}


def test_each_row_is_found_by_its_key_and_they_come_in_the_order_of_ids_and_numbers(tmp_path: Path):
    rows = [chain(i, n, text=f"{i}/{n}") for i in range(50) for n in (0, 1, 255)]
    random.Random(0).shuffle(rows)
    index = RowIndex([written(tmp_path / "a.jsonl", rows[:70]), written(tmp_path / "b.jsonl", rows[70:])], chain_key)
    assert len(index) == 150
    for row in rows:
        assert index.get(chain_key(row)) == row and chain_key(row) in index
    assert index.get((prompt_id("p0"), 2)) is None and (prompt_id("x"), 0) not in index
    in_order = sorted(rows, key=chain_key)
    assert [json.loads(line) for line in index.lines()] == in_order


def test_of_two_rows_with_the_same_key_the_later_one_counts(tmp_path: Path):
    a = written(tmp_path / "a.jsonl", [chain(1, 0, text="old"), chain(1, 0, text="newer")])
    b = written(tmp_path / "b.jsonl", [chain(1, 0, text="newest")])
    assert (len(RowIndex([a], chain_key)), RowIndex([a], chain_key).get((prompt_id("p1"), 0))["text"]) == (1, "newer")
    assert RowIndex([a, b], chain_key).get((prompt_id("p1"), 0))["text"] == "newest"


def test_ids_that_are_no_hex_digits_are_told_apart_too(tmp_path: Path):
    rows = [{"prompt_id": name, "number": 0} for name in ("p1", "p2", "", "a" * 17, "é")]
    index = RowIndex([written(tmp_path / "a.jsonl", rows)], chain_key)
    assert len(index) == 5 and all(index.get((r["prompt_id"], 0)) == r for r in rows)
    assert id_as_uint64("ff") == 255 and id_as_uint64("p1") != id_as_uint64("p2")


def test_turns_have_keys_of_their_own(tmp_path: Path):
    turns = [
        {"prompt_id": "ab", "chain": c, "step": s, "role": r, "request": "0123456789ab", "seed": 7}
        for c in (0, 255)
        for s in (0, 1, 64)
        for r in ("answer", "critique", "revision")
    ]
    assert len({turn_key(t) for t in turns}) == 18
    assert request_key(turns[0]) == ("0123456789ab", 7) and request_key({"request": ""}) is None


def test_a_torn_last_line_is_no_row_and_a_damaged_one_is_told(tmp_path: Path):
    file = written(tmp_path / "a.jsonl", [chain(1, 0)])
    with file.path.open("ab") as out:
        out.write(b'{"prompt_id": "x", "num')
    assert len(RowIndex([file], chain_key)) == 1
    with file.path.open("ab") as out:
        out.write(b'ber": 5}\n{"prompt_id": "y"}\n')
    with pytest.raises(RunError, match=r"a\.jsonl line 3 is damaged"):
        RowIndex([file], chain_key)
    with pytest.raises(RunError, match=r"b\.jsonl line 1 is damaged: chain"):
        list(OrderedRows(written(tmp_path / "b.jsonl", [{"prompt_id": "ab", "number": 1}]), Turn, chain_key))


def test_prompts_are_read_as_they_are_asked_for(tmp_path: Path):
    prompts = [Prompt(prompt_id(t), t, t[:1], "test" if t == "b" else "train") for t in ("a", "b", "c", "d")]
    rows = written(tmp_path / "prompts.jsonl", prompts)
    stored = StoredPrompts(rows, "train", keep=lambda i: i != prompt_id("d"))
    assert len(stored) == 2 and list(stored) == [prompt_id("a"), prompt_id("c")]
    assert stored[prompt_id("c")] == prompts[2] and stored.get(prompt_id("b")) is stored.get(prompt_id("d")) is None
    assert list(stored.values()) == list(stored.values()) == [prompts[0], prompts[2]]


def test_a_key_takes_less_than_64_bytes(tmp_path: Path):
    n = 50_000
    file = written(tmp_path / "a.jsonl", [chain(i, 0, text="x" * 200) for i in range(n)])
    RowIndex([file], chain_key)
    tracemalloc.start()
    index = RowIndex([file], chain_key)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == n and most / n < 64
