"""Checks before any weight is loaded: the training rows, their lengths, and the loss mask."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from dsc_hub.distill.config import plan_of
from dsc_hub.errors import DataError, ModelError
from dsc_hub.runs.run import Run

# -- checks of the rows


@dataclass(frozen=True)
class Token:
    """A token of a rendered row, and whether it has a loss."""

    text: str
    id: int
    trained: bool


@dataclass(frozen=True)
class TrainingData:
    """What will be trained. `max_length` and `longest` are in tokens; no row is longer than `max_length`.

    `prompt_rerendered` counts rows whose prompt the template renders differently once an answer follows. `first_row` is
    the first training row, token by token.
    """

    rows: int
    validation_rows: int
    max_length: int
    longest: int
    truncated: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    prompt_rerendered: int
    stop_tokens: list[str]
    first_row: list[Token]


def check_training(run: Run) -> TrainingData:
    """Check everything that can fail before a weight is loaded: recipe keys, chat template, rows, mask. Takes seconds.

    ConfigError: unknown or refused keys. ModelError: no usable chat template. DataError: test rows, or rows that are no
    conversations, exceed `serving.context` or `sft.max_length`, train no token, or do not train the end of the answer.
    """
    facts = run.facts
    recipe = facts.recipe
    plan, folder = plan_of(recipe.distill), facts.model.weights
    tokenizer = tokenizer_of(folder)
    stops = stop_tokens(tokenizer, folder)
    splits = training_rows(run, recipe.chain.system)

    rendered = {split: [_render(tokenizer, row) for row in rows] for split, rows in splits.items()}
    everything = [r for rows in rendered.values() for r in rows]
    longest = max(len(ids) for ids, _, _ in everything)
    _check_lengths([len(ids) for ids, _, _ in everything], recipe.serving.context, "serving.context")
    limit = plan.sft.get("max_length")
    if limit is not None:
        _check_lengths([len(ids) for ids, _, _ in everything], limit, "distill.sft.max_length")
    for split, rows in rendered.items():
        for number, (ids, start, _) in enumerate(rows, 1):
            if start >= len(ids):
                raise DataError(
                    f"{split} row {number}: nothing would be trained: the chat template renders no answer",
                    "Look at the model's chat_template.jinja.",
                )
            if not ends(tokenizer, ids[start:], stops):
                last = tokenizer.decode(ids[-1:])
                raise DataError(
                    f"{split} row {number}: the answer does not end with a token that ends the turn: expected one of "
                    f"{_module_names(tokenizer, stops)}, got {last!r}; the tuned model would never stop",
                    "The chat template and the tokenizer's eos_token (or generation_config.json) don't fit together.",
                )
    train = rendered["train"]
    ids, start, _ = train[0]
    return TrainingData(
        rows=len(train),
        validation_rows=len(rendered["validation"]),
        max_length=longest if limit is None else limit,
        longest=longest,
        truncated=0,
        tokens_per_epoch=sum(len(i) for i, _, _ in train),
        trained_tokens_per_epoch=sum(len(i) - s for i, s, _ in train),
        prompt_rerendered=sum(not same for _, _, same in train),
        stop_tokens=_module_names(tokenizer, stops),
        first_row=[Token(tokenizer.decode([t]), t, n >= start) for n, t in enumerate(ids)],
    )


def training_rows(run: Run, system: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return the train and validation rows as {prompt, completion}; validation may be empty. Else DataError."""
    folder = run["dataset"] / "sft"
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
            columns = set(content.schema_arrow.names)
            if not content.metadata.num_rows:
                continue
            if missing := {"prompt", "completion"} - columns:
                raise DataError(
                    f"{path.name} has no column '{min(missing)}'; it has {sorted(columns)}",
                    "Make the dataset again with `dsc run`.",
                )
            table = content.read(columns=["prompt", "completion", *(["split"] if "split" in columns else [])])
        if "split" in columns and "test" in table.column("split").to_pylist():
            raise DataError(
                f"{path.name} holds test rows (column 'split')",
                "Training never sees them: make the dataset again with `dsc run`.",
            )
        for number, row in enumerate(table.select(["prompt", "completion"]).to_pylist(), 1):
            rows.append(_conversation(row, system, f"{path.name} row {number}"))
    if not out["train"]:
        raise DataError(
            "there is no row to train on",
            "Fewer constraints in the recipe's `dataset` section, or more prompts and steps, keep more chains.",
        )
    return out


def _conversation(row: Mapping[str, Any], system: str | None, where: str) -> dict[str, Any]:
    """Check one row and return it; the recipe's system text is prepended if missing, as in generation."""
    turns = {
        name: [{"role": m["role"], "content": m["content"]} for m in row[name] or []]
        for name in ("prompt", "completion")
    }
    prompt, completion = turns["prompt"], turns["completion"]
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError(
            f"{where}: expected a prompt that ends with a user turn, got roles {[m['role'] for m in prompt]}"
        )
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise DataError(
            f"{where}: expected a completion of one assistant turn, got roles {[m['role'] for m in completion]}"
        )
    if not (completion[0]["content"] or "").strip():
        raise DataError(f"{where}: the completion is empty")
    row_system = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    if system is not None and row_system is None:
        prompt.insert(0, {"role": "system", "content": system})
    elif row_system != system and row_system is not None:
        raise DataError(
            f"{where}: its system text is not the recipe's chain.system",
            "Training and generation must show the model the same conversation.",
        )
    return turns


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelError(f"no usable tokenizer in {folder}: {str(e).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {folder} has no chat template",
            "Use an instruct model, or add chat_template.jinja to its folder.",
        )
    return tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[int]:
    """Return the ids that end a generation: the tokenizer's EOS id and those of generation_config.json."""
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(folder).eos_token_id
        stops |= {more} if isinstance(more, int) else set(more or ())
    if not stops:
        raise ModelError(
            f"the model in {folder} names no token that ends an answer (eos_token)",
            "Without one a tuned model never stops.",
        )
    return stops


def _render(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], int, bool]:
    """Return the token ids of the row, the start of the trained part, and whether the prompt alone renders the same.

    The rule is that of trl: tokens after the longest common prefix of prompt and whole conversation are trained.
    """
    try:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)[
            "input_ids"
        ]
    except TemplateError as e:
        raise ModelError(
            f"the model's chat template refuses the conversation: {e}",
            "Some templates know no system turn: leave chain.system out.",
        ) from None
    start = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return ids, start, start == len(prompt)


def ends(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], stops: set[int]) -> bool:
    """Return whether the trained part ends with a stop token; whitespace of the template after it is ignored."""
    for token in reversed(trained):
        if token in stops:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _module_names(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in sorted(ids)]


def _check_lengths(lengths: Sequence[int], limit: int, key: str) -> None:
    if over := sum(n > limit for n in lengths):
        raise DataError(
            f"{over} of {len(lengths)} rows are longer than {key} = {limit} tokens "
            f"(the longest has {max(lengths)}); they would lose their ends",
            f"Raise {key} to {max(lengths)}, or lower generation.max_new_tokens.",
        )
