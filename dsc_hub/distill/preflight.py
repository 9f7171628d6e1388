"""Checks before any weight is loaded: the training rows, their lengths, and the loss mask."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from jinja2 import TemplateError
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from trl.data_utils import common_prefix_length

from dsc_hub.config.recipe import Recipe, training_seed
from dsc_hub.config.sampling import TEMPLATE_SETTINGS
from dsc_hub.distill.config import BY_OBJECTIVE, plan_of
from dsc_hub.errors import DataError, ModelError
from dsc_hub.records import Message, Tool, prompt_id
from dsc_hub.runs.run import Run

TOKENISED_TOGETHER = 2000  # rows: their tokens are held in memory
TOOLS = "tools"  # column of trl: JSON text of a row's tools, or null
ANSWER_COLUMNS = ("completion", "chosen", "rejected")  # columns of a row with a loss

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

    `rows` are rows of the dataset; `answers` are the sequences in them that have a loss (two in a pair).
    `prompt_rerendered` counts rows whose prompt the template renders differently once an answer follows. `first_row` is
    the first training row with its first answer, token by token.
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

    rendered = {split: list(_render_rows(tokenizer, rows, stops)) for split, rows in splits.items()}
    lengths = [n for rows in rendered.values() for row in rows for n in row.lengths]
    longest = max(lengths)
    _check_lengths(lengths, recipe.serving.context, "serving.context")
    limit = plan.settings.get("max_length")
    if limit is not None:
        _check_lengths(lengths, limit, f"distill.{plan.objective}.max_length")
    for split, rows in rendered.items():
        for number, row in enumerate(rows, 1):
            _check_end(row, f"{split} row {number}", tokenizer, stops)
    train, first_row = rendered["train"], splits["train"][0]
    answer = next(first_row[c] for c in ANSWER_COLUMNS if c in first_row)
    first_settings = first_row.get(TEMPLATE_SETTINGS, {})
    first = _tokenised(tokenizer, [first_row["prompt"] + answer], [_tools(first_row)], **first_settings)[0]
    _check_prompt(tokenizer, first_row, answer)
    return TrainingData(
        rows=len(train),
        answers=sum(len(row.lengths) for row in train),
        validation_rows=len(rendered["validation"]),
        max_length=longest if limit is None else limit,
        longest=longest,
        truncated=0,
        tokens_per_epoch=sum(n for row in train for n in row.lengths),
        trained_tokens_per_epoch=sum(n - row.start for row in train for n in row.lengths),
        prompt_rerendered=sum(not row.keeps_prompt for row in train),
        stop_tokens=_token_texts(tokenizer, stops),
        first_row=[Token(tokenizer.decode([t]), t, n >= train[0].start) for n, t in enumerate(first)],
    )


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
    elif prompt[0]["content"] != system and row.get("prompt_id") != prompt_id("", prompt, _tools(row)):
        raise DataError(
            f"{where}: its system text is neither the recipe's chain.system nor its prompt's own",
            "Training and generation must show the model the same conversation.",
        )


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


class _Rendered(NamedTuple):
    """What is checked of a rendered row.

    `lengths` are the tokens of the prompt with each answer, `start` the number of those before the trained part,
    `keeps_prompt` whether the prompt alone renders the same. `wrong_end` is the last token of the first answer that
    does not end with a stop token (-1: it is empty); None if all do.
    """

    lengths: tuple[int, ...]
    start: int
    keeps_prompt: bool
    wrong_end: int | None


def _render_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], stops: set[int]
) -> Iterator[_Rendered]:
    """Yield each row as `_Rendered`, tokenised in batches.

    The rule is that of trl: tokens after the longest common prefix of prompt and whole conversation are trained, in a
    pair after the shorter of the two.
    """
    for begin in range(0, len(rows), TOKENISED_TOGETHER):
        some = rows[begin : begin + TOKENISED_TOGETHER]
        settings = some[0].get(TEMPLATE_SETTINGS, {})  # the same in all rows
        tools = [_tools(row) for row in some]
        prompts = _tokenised(tokenizer, [row["prompt"] for row in some], tools, add_generation_prompt=True, **settings)
        answers = [[row[c] for c in ANSWER_COLUMNS if c in row] for row in some]
        whole = iter(
            _tokenised(
                tokenizer,
                [r["prompt"] + a for r, each in zip(some, answers, strict=True) for a in each],
                [t for t, each in zip(tools, answers, strict=True) for _ in each],
                **settings,
            )
        )
        for prompt, each in zip(prompts, answers, strict=True):
            sequences = [next(whole) for _ in each]
            start = min(common_prefix_length(prompt, ids) for ids in sequences)
            wrong = next((ids for ids in sequences if not ends(tokenizer, ids[start:], stops)), None)
            yield _Rendered(
                lengths=tuple(map(len, sequences)),
                start=start,
                keeps_prompt=start == len(prompt),
                wrong_end=None if wrong is None else wrong[-1] if len(wrong) > start else -1,
            )


def _tools(row: Mapping[str, Any]) -> list[Tool]:
    """Return the tools of a row; [] if it has none."""
    tools: list[Tool] = json.loads(row.get(TOOLS) or "[]")
    return tools


def _tokenised(
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[Message]],
    tools: Sequence[Sequence[Tool]],
    **more: Any,
) -> list[list[int]]:
    """Return the token ids of rendered conversations, each with its tools.

    ModelError if the chat template refuses one, or leaves tools out.
    """
    if any(tools):
        texts = [
            _rendered(tokenizer, conversation, own, **more)
            for conversation, own in zip(conversations, tools, strict=True)
        ]
        first = next(n for n, own in enumerate(tools) if own)
        if texts[first] == _rendered(tokenizer, conversations[first], (), **more):
            raise ModelError(
                "the model's chat template leaves tools out: with and without them it renders the same",
                "Use a model whose template knows tools, or leave prompts.tools_column out.",
            )
    else:
        try:
            texts = tokenizer.apply_chat_template(conversations, tokenize=False, **more)
        except TemplateError:  # say of which one
            texts = [_rendered(tokenizer, conversation, (), **more) for conversation in conversations]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return ids


def _check_prompt(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], answer: list[Message]) -> None:
    """DataError if a text of the prompt is not in the part of the row that prompt and whole row have in common: it
    would be trained, or lost."""
    settings = {"tokenize": False, "tools": _tools(row) or None, **row.get(TEMPLATE_SETTINGS, {})}
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


def _rendered(
    tokenizer: PreTrainedTokenizerBase, conversation: list[Message], tools: Sequence[Tool], **more: Any
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(conversation, tools=list(tools) or None, tokenize=False, **more)
    except TemplateError as e:
        roles = ", ".join(m["role"] for m in conversation)
        raise ModelError(
            f"the model's chat template refuses a conversation with the turns {roles}: {e}",
            "Some templates know no system turn (chain.system, or a prompt's own), or only turns of user and assistant "
            "that alternate.",
        ) from None
    return text


def _check_end(row: _Rendered, where: str, tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> None:
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


def ends(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], stops: set[int]) -> bool:
    """Return whether the trained part ends with a stop token; whitespace of the template after it is ignored."""
    for token in reversed(trained):
        if token in stops:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in sorted(ids)]


def _check_lengths(lengths: Sequence[int], limit: int, key: str) -> None:
    if over := sum(n > limit for n in lengths):
        raise DataError(
            f"{over} of {len(lengths)} rows are longer than {key} = {limit} tokens "
            f"(the longest has {max(lengths)}); they would lose their ends",
            f"Raise {key} to {max(lengths)}, or lower generation.max_new_tokens.",
        )
