"""Rows of several turns, with a system text and tools of their own: what is rendered, checked and trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.distill import train as distill_train
from dsc_hub.distill.preflight import check_training
from dsc_hub.distill.rows import training_rows
from dsc_hub.errors import DataError, ModelError
from dsc_hub.records import prompt_id
from tests.data.test_conversations import TOOL, turns
from tests.distill.test_distill import Spy
from tests.distill.tiny import QUICK, make_run, pair, row
from tests.inference.chat_templates import KNOWS_TOOLS


def talk(n: int, tools: bool = False) -> dict[str, Any]:
    """What a row of the dataset has of a conversation; every second one without a system text of its own."""
    messages = turns(f"Seen film {n}?", "Twice.", "So?", system=f"You are critic {n}." if n % 2 else "")
    own = [TOOL] if tools and n % 4 < 2 else []
    out = {"prompt": messages, "prompt_id": prompt_id("", messages, own)}
    return out | ({"tools": json.dumps(own) if own else None} if tools else {})


def with_template(base: Path, folder: Path, template: str) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_only_the_answer_after_all_turns_is_trained_under_the_rows_own_system_text(tmp_path, base, monkeypatch):
    monkeypatch.setattr("dsc_hub.distill.trainers.TRAINERS", {"sft": Spy})
    rows = [row(n) | talk(n) for n in range(4)]
    settings = QUICK | {"max_steps": 2, "per_device_train_batch_size": 2}
    run = make_run(tmp_path / "run", base, rows, system="Be brief.", sft=settings)
    checked = check_training(run)
    assert checked.rows == checked.answers == 4 and checked.prompt_rerendered == 0
    distill_train.train(run)
    tokenizer, seen = Spy.last.processing_class, []
    for batch in Spy.last.batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert tokenizer.decode(labels[labels != -100]).startswith("A warm and lovely film.")
            seen.append(tokenizer.decode(ids[labels == -100]))
    assert len(Spy.last.batches) == 2
    for n in range(4):
        system = f"You are critic {n}." if n % 2 else "Be brief."
        asked = f"<|im_start|>user\nSeen film {n}?<|im_end|>\n<|im_start|>assistant\nTwice.<|im_end|>\n"
        shown = f"<|im_start|>system\n{system}<|im_end|>\n{asked}<|im_start|>user\nSo?<|im_end|>\n"
        assert sum(text.startswith(f"{shown}<|im_start|>assistant\n") for text in seen) == 1


def test_a_system_text_that_is_not_its_prompts_own_is_refused(tmp_path, base):
    changed = talk(1)
    changed["prompt"][0]["content"] = "Be rude."
    with pytest.raises(DataError, match="neither the recipe's chain.system nor its prompt's own"):
        check_training(make_run(tmp_path / "run", base, [row(1) | changed]))


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_tools_are_shown_in_training_as_they_were_in_generation(tmp_path, base, objective: str):
    model = with_template(base, tmp_path / "model", KNOWS_TOOLS)
    rows = [(row(n) if objective == "sft" else pair(n)) | talk(n, tools=True) for n in range(4)]
    config = "sft" if objective == "sft" else "preference"
    settings = {objective: {"max_steps": 2, "per_device_train_batch_size": 2}}
    run = make_run(tmp_path / "run", model, rows, config=config, objective=objective, **settings)
    first = training_rows(run, run.facts.recipe)["train"][0]
    shown = "".join(t.text for t in check_training(run).first_row)
    assert (f"system\n{json.dumps([TOOL])}" in shown) == (first["tools"] is not None)
    distill_train.train(run)  # whose own batches are compared with the preflight's
    rows = [row | {"tools": None, "prompt_id": prompt_id("", row["prompt"])} for row in rows]
    without = make_run(tmp_path / "without", model, rows, config=config, objective=objective, **settings)
    assert "rain" not in "".join(t.text for t in check_training(without).first_row)


def test_a_template_that_does_not_know_tools_is_refused(tmp_path, base):
    with pytest.raises(ModelError, match="leaves tools out"):
        check_training(make_run(tmp_path / "run", base, [row(0) | talk(0, tools=True)]))
