"""The rows of a training, read from the run's dataset in the columns of trl."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from dsc_hub.config.recipe import Recipe, training_seed
from dsc_hub.config.serving import TEMPLATE_SETTINGS
from dsc_hub.distill.config import BY_OBJECTIVE
from dsc_hub.errors import DataError
from dsc_hub.records import Message, Tool, prompt_id
from dsc_hub.runs.run import Run

TOOLS = "tools"  # column of trl: JSON text of a row's tools, or null
ANSWER_COLUMNS = ("completion", "chosen", "rejected")  # columns of a row with a loss


def training_rows(run: Run, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return the train and validation rows of the recipe's objective, in the columns that trl reads.

    sft: prompt, completion, and the reward where rows have one. dpo: prompt, chosen, rejected. kto: prompt, completion,
    label (`unpaired`). Where prompts have tools, each row has its own as JSON text (null: none) in trl's own column;
    where the recipe has chat_template_kwargs for the server, each row has them, too. Validation may be empty. DataError
    if training is, or for test rows and rows that are no conversations.
    """
    objective = BY_OBJECTIVE[recipe.distill.objective]
    rows = _read_rows(run, objective.rows, objective.answers, recipe.chain.system)
    if recipe.distill.objective == "kto":
        rows = {split: unpaired(pairs, training_seed(recipe)) for split, pairs in rows.items()}
    settings = template_settings(recipe)
    return {split: [row | settings for row in of_split] for split, of_split in rows.items()}


def template_settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return {TEMPLATE_SETTINGS: kwargs} if the server renders conversations with settings of its own; else {}."""
    settings = recipe.generation.template_settings
    return {TEMPLATE_SETTINGS: settings} if settings else {}


def unpaired(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the answers of all pairs as rows {prompt, completion, label}, in an order drawn from the seed.

    trl pairs each answer with its neighbour's prompt and so needs them in a fixed order. Unpairing them itself, it
    would train on all desirable answers first.
    """
    rows = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        | ({TOOLS: pair[TOOLS]} if TOOLS in pair else {})
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    random.Random(seed).shuffle(rows)
    return rows


def _read_rows(run: Run, config: str, answers: Sequence[str], system: str | None) -> dict[str, list[dict[str, Any]]]:
    folder, columns = run["dataset"] / config, ("prompt", *answers)
    if test_files := sorted(p.name for p in folder.glob("*") if p.name.startswith("test")):
        raise DataError(
            f"test rows in the training folder: {folder / test_files[0]}",
            "Training never sees them: make the dataset again with `dsc run`.",
        )
    out: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for split, rows in out.items():
        path = folder / f"{split}-00000-of-00001.parquet"
        if not path.is_file():
            continue
        with path.open("rb") as file:
            content = pq.ParquetFile(file)
            present = set(content.schema_arrow.names)
            if not content.metadata.num_rows:
                continue
            if missing := set(columns) - present:
                raise DataError(
                    f"{path.name} has no column '{min(missing)}'; it has {sorted(present)}",
                    "Make the dataset again with `dsc run`.",
                )
            more = [name for name in (TOOLS, "reward") if name in present]
            checked = [name for name in ("split", "prompt_id") if name in present]
            table = content.read(columns=[*columns, *more, *checked])
        if "split" in present and "test" in table.column("split").to_pylist():
            raise DataError(
                f"{path.name} holds test rows (column 'split')",
                "Training never sees them: make the dataset again with `dsc run`.",
            )
        for number, row in enumerate(table.to_pylist(), 1):
            where = f"{path.name} row {number}"
            turns = _conversation({name: row[name] for name in columns}, where)
            _add_system(turns["prompt"], system, row, where)
            rows.append(turns | {name: row[name] for name in more})
    if not out["train"]:
        raise DataError(
            f"there is no training row in the dataset's config `{config}`",
            "Loosen dataset.min_reward and min_gain, or sample more prompts, steps or chains: then more are kept.",
        )
    return out


def _conversation(row: Mapping[str, Any], where: str) -> dict[str, list[Message]]:
    """Check the turns of one row and return them by column."""
    turns = {name: [{"role": m["role"], "content": m["content"]} for m in row[name] or []] for name in row}
    prompt = turns["prompt"]
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError(
            f"{where}: expected a prompt that ends with a user turn, got roles {[m['role'] for m in prompt]}"
        )
    for name, answer in turns.items():
        if name == "prompt":
            continue
        if len(answer) != 1 or answer[0]["role"] != "assistant":
            raise DataError(f"{where}: expected {name} of one assistant turn, got roles {[m['role'] for m in answer]}")
        if not (answer[0]["content"] or "").strip():
            raise DataError(f"{where}: {name} is empty")
    return turns


def _add_system(prompt: list[Message], system: str | None, row: Mapping[str, Any], where: str) -> None:
    """Put the recipe's system text before the turns of a prompt that has none, as in generation.

    DataError for another one, unless it is part of the prompt: then the row's prompt id is that of the turns.
    """
    if prompt[0]["role"] != "system":
        if system:
            prompt.insert(0, {"role": "system", "content": system})
    elif prompt[0]["content"] != system and row.get("prompt_id") != prompt_id("", prompt, tools_of(row)):
        raise DataError(
            f"{where}: its system text is neither the recipe's chain.system nor its prompt's own",
            "Training and generation must show the model the same conversation.",
        )


def tools_of(row: Mapping[str, Any]) -> list[Tool]:
    """Return the tools of a row; [] if it has none."""
    tools: list[Tool] = json.loads(row.get(TOOLS) or "[]")
    return tools
