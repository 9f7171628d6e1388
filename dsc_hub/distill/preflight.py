"""Checks before any weight is loaded: the training rows, their lengths, and the loss mask."""

from __future__ import annotations

import random
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

from dsc_hub.config.recipe import Recipe, training_seed
from dsc_hub.distill.config import BY_OBJECTIVE, plan_of
from dsc_hub.errors import DataError, ModelError
from dsc_hub.runs.run import Run

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
    plan, folder = plan_of(recipe.distill), facts.model.weights
    tokenizer = tokenizer_of(folder)
    stops = stop_tokens(tokenizer, folder)
    splits = training_rows(run, recipe)

    rendered = {
        split: [
            _render(tokenizer, row["prompt"], [row[name] for name in ANSWER_COLUMNS if name in row]) for row in rows
        ]
        for split, rows in splits.items()
    }
    lengths = [len(ids) for rows in rendered.values() for answers, _, _ in rows for ids in answers]
    longest = max(lengths)
    _check_lengths(lengths, recipe.serving.context, "serving.context")
    limit = plan.settings.get("max_length")
    if limit is not None:
        _check_lengths(lengths, limit, f"distill.{plan.objective}.max_length")
    for split, rows in rendered.items():
        for number, ids, start in ((n, ids, s) for n, (answers, s, _) in enumerate(rows, 1) for ids in answers):
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
    (first, *_), start, _ = train[0]
    return TrainingData(
        rows=len(train),
        answers=sum(len(answers) for answers, _, _ in train),
        validation_rows=len(rendered["validation"]),
        max_length=longest if limit is None else limit,
        longest=longest,
        truncated=0,
        tokens_per_epoch=sum(len(i) for answers, _, _ in train for i in answers),
        trained_tokens_per_epoch=sum(len(i) - s for answers, s, _ in train for i in answers),
        prompt_rerendered=sum(not same for _, _, same in train),
        stop_tokens=_module_names(tokenizer, stops),
        first_row=[Token(tokenizer.decode([t]), t, n >= start) for n, t in enumerate(first)],
    )


def training_rows(run: Run, recipe: Recipe) -> dict[str, list[dict[str, Any]]]:
    """Return the train and validation rows of the recipe's objective, in the columns that trl reads.

    sft: prompt, completion, and the reward where rows have one. dpo: prompt, chosen, rejected. kto: prompt, completion,
    label (`unpaired`). Validation may be empty. DataError if training is, or for test rows and rows that are no
    conversations.
    """
    objective = BY_OBJECTIVE[recipe.distill.objective]
    rows = _read_rows(run, objective.rows, objective.answers, recipe.chain.system)
    if recipe.distill.objective == "kto":
        return {split: unpaired(pairs, training_seed(recipe)) for split, pairs in rows.items()}
    return rows


def unpaired(pairs: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the answers of all pairs as rows {prompt, completion, label}, in an order drawn from the seed.

    trl pairs each answer with its neighbour's prompt and so needs them in a fixed order. Unpairing them itself, it
    would train on all desirable answers first.
    """
    rows = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
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
            table = content.read(columns=[*columns, *(name for name in ("split", "reward") if name in present)])
        if "split" in present and "test" in table.column("split").to_pylist():
            raise DataError(
                f"{path.name} holds test rows (column 'split')",
                "Training never sees them: make the dataset again with `dsc run`.",
            )
        for number, row in enumerate(table.to_pylist(), 1):
            turns = _conversation({name: row[name] for name in columns}, system, f"{path.name} row {number}")
            rows.append(turns | ({"reward": row["reward"]} if "reward" in row else {}))
    if not out["train"]:
        raise DataError(
            f"there is no row of the config `{config}` to train on",
            "Fewer constraints in the recipe's `dataset` section, or more prompts and steps, keep more chains.",
        )
    return out


def _conversation(row: Mapping[str, Any], system: str | None, where: str) -> dict[str, Any]:
    """Check one row and return it; the recipe's system text is prepended if missing, as in generation."""
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


def _render(
    tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], answers: Sequence[list[dict[str, str]]]
) -> tuple[list[list[int]], int, bool]:
    """Return the token ids of the prompt with each answer, the start of the trained parts, and whether the prompt alone
    renders the same.

    The rule is that of trl: tokens after the longest common prefix of prompt and whole conversation are trained, in a
    pair after the shorter of the two.
    """

    def ids(conversation: list[dict[str, str]], **more: Any) -> list[int]:
        out: list[int] = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **more)[
            "input_ids"
        ]
        return out

    try:
        alone = ids(prompt, add_generation_prompt=True)
        whole = [ids(prompt + answer) for answer in answers]
    except TemplateError as e:
        raise ModelError(
            f"the model's chat template refuses the conversation: {e}",
            "Some templates know no system turn: leave chain.system out.",
        ) from None
    start = min(_common_prefix(alone, one) for one in whole)
    return whole, start, start == len(alone)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


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
