"""Checks before any weight is loaded: the training rows, their lengths, and the loss mask."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.serving import TEMPLATE_SETTINGS
from dsc_hub.distill.config import plan_of
from dsc_hub.distill.rows import ANSWER_COLUMNS, tools_of, training_rows
from dsc_hub.distill.tokens import RowTokens, stop_tokens, tokenise_rows, tokenised_dataset, tokenizer_of
from dsc_hub.errors import DataError
from dsc_hub.records import Message
from dsc_hub.runs.run import Run


@dataclass(frozen=True)
class Token:
    """A token of a rendered row, and whether it has a loss."""

    text: str
    id: int
    trained: bool


@dataclass(frozen=True)
class TrainingData:
    """What will be trained. `max_length` and `longest` are in tokens; no row is longer than `max_length`.

    `rows` are rows of the dataset; `answers` are the sequences in them that have a loss (two in a pair).
    `prompt_rerendered` counts rows whose prompt the template renders differently once an answer follows. `first_row` is
    the first training row with its first answer, token by token. `train` and `validation` (None: no rows) are what
    the trainer gets: token ids and labels for sft, texts in trl's columns for pairs. `rewards` are those of the
    training rows, None for a row without one.
    """

    rows: int
    answers: int
    validation_rows: int
    max_length: int
    longest: int
    truncated: int
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    prompt_rerendered: int
    stop_tokens: list[str]
    first_row: list[Token]
    train: datasets.Dataset = field(repr=False)
    validation: datasets.Dataset | None = field(repr=False)
    rewards: Sequence[float | None] = field(repr=False)


def check_training(run: Run) -> TrainingData:
    """Check everything that can fail before a weight is loaded: recipe keys, chat template, rows, mask. Takes seconds.

    ConfigError: unknown or refused keys. ModelError: no usable chat template. DataError: test rows, or rows that are no
    conversations, exceed `serving.context` or `sft.max_length`, train no token, or do not train the end of the answer.
    """
    facts = run.facts
    recipe = facts.recipe
    plan, folder = plan_of(recipe.distill), facts.base.weights
    tokenizer = tokenizer_of(folder)
    stops = stop_tokens(tokenizer, folder)
    splits = training_rows(run, recipe)
    together = plan.settings["per_device_train_batch_size"] * recipe.distill.processes
    if plan.settings.get("dataloader_drop_last") and len(splits["train"]) < together:
        raise DataError(
            f"{len(splits['train'])} training rows are fewer than the {together} of a batch, and with "
            "dataloader_drop_last no step would be made",
            f"Leave distill.{plan.objective}.dataloader_drop_last out, or lower per_device_train_batch_size.",
        )

    tokens = {split: list(tokenise_rows(tokenizer, rows, stops)) for split, rows in splits.items()}
    lengths = [len(ids) for rows in tokens.values() for row in rows for ids in row.sequences]
    longest = max(lengths)
    _check_lengths(lengths, recipe.serving.context, "serving.context")
    limit = plan.settings.get("max_length")
    if limit is not None:
        _check_lengths(lengths, limit, f"distill.{plan.objective}.max_length")
    for split, rows in tokens.items():
        for number, row in enumerate(rows, 1):
            _check_end(row, f"{split} row {number}", tokenizer, stops)
    train = tokens["train"]
    _check_prompt(tokenizer, splits["train"][0])
    return TrainingData(
        rows=len(train),
        answers=sum(len(row.sequences) for row in train),
        validation_rows=len(tokens["validation"]),
        max_length=longest if limit is None else limit,
        longest=longest,
        truncated=0,
        tokens_per_epoch=sum(len(ids) for row in train for ids in row.sequences),
        trained_tokens_per_epoch=sum(len(ids) - row.start for row in train for ids in row.sequences),
        prompt_rerendered=sum(not row.keeps_prompt for row in train),
        stop_tokens=_token_texts(tokenizer, stops),
        first_row=[
            Token(tokenizer.decode([t]), int(t), n >= train[0].start) for n, t in enumerate(train[0].sequences[0])
        ],
        train=_dataset(recipe, splits["train"], train),
        validation=_dataset(recipe, splits["validation"], tokens["validation"]) if tokens["validation"] else None,
        rewards=[row.get("reward") for row in splits["train"]],
    )


def _dataset(recipe: Recipe, rows: Sequence[Mapping[str, Any]], tokens: Sequence[RowTokens]) -> datasets.Dataset:
    """Return what the trainer gets of a split. Only for sft does trl take rows that are tokenised already."""
    if recipe.distill.objective == "sft":
        return tokenised_dataset(tokens)
    return datasets.Dataset.from_list([{k: v for k, v in row.items() if k != "reward"} for row in rows])


def _check_prompt(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> None:
    """DataError if a text of the prompt is not in the part of the row that prompt and whole row have in common: it
    would be trained, or lost."""
    answer: list[Message] = next(row[c] for c in ANSWER_COLUMNS if c in row)
    settings = {"tokenize": False, "tools": tools_of(row) or None, **row.get(TEMPLATE_SETTINGS, {})}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **settings)
    whole = tokenizer.apply_chat_template(row["prompt"] + answer, **settings)
    common = os.path.commonprefix([prompt, whole])
    asked = [m for m in row["prompt"] if m["role"] != "assistant" and m["content"].strip() in prompt]
    if lost := [m["role"] for m in asked if m["content"].strip() not in common]:
        raise DataError(
            f"the chat template renders the prompt of a row otherwise once an answer follows: its {lost[0]} text is "
            "not in the part that is not trained",
            "Training would show the model another prompt than generation. Leave chain.system out, or use a model "
            "whose template renders both alike.",
        )


def _check_end(row: RowTokens, where: str, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> None:
    """DataError if an answer of the row is empty, or does not end with a stop token."""
    if row.wrong_end is None:
        return
    if row.wrong_end < 0:
        raise DataError(
            f"{where}: nothing would be trained: the chat template renders no answer",
            "Look at the model's chat_template.jinja.",
        )
    raise DataError(
        f"{where}: the answer does not end with a token that ends the turn: expected one of "
        f"{_token_texts(tokenizer, stops)}, got {tokenizer.decode([row.wrong_end])!r}; the tuned model would never "
        "stop",
        "The chat template and the tokenizer's eos_token (or generation_config.json) don't fit together.",
    )


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in sorted(ids)]


def _check_lengths(lengths: Sequence[int], limit: int, key: str) -> None:
    if over := sum(n > limit for n in lengths):
        raise DataError(
            f"{over} of {len(lengths)} rows are longer than {key} = {limit} tokens "
            f"(the longest has {max(lengths)}); they would lose their ends",
            f"Raise {key} to {max(lengths)}, or lower generation.max_new_tokens.",
        )
