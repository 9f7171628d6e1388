"""Rows of a training as token ids, by the rule of trl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from dsc_hub.config.serving import TEMPLATE_SETTINGS
from dsc_hub.distill.rows import ANSWER_COLUMNS, tools_of
from dsc_hub.errors import ModelError
from dsc_hub.records import Message, Tool

TOKENISED_TOGETHER = 2000  # rows: their tokens are held as Python lists


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model; ModelError if it has none that can be used, or no chat template."""
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


def ends(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], stops: set[int]) -> bool:
    """Return whether the trained part ends with a stop token; whitespace of the template after it is ignored."""
    for token in reversed(trained):
        if token in stops:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


class RowTokens(NamedTuple):
    """A row as token ids.

    `sequences` are the prompt with each answer, int32; `start` is the number of tokens before the trained part,
    `keeps_prompt` whether the prompt alone renders the same. `wrong_end` is the last token of the first answer that
    does not end with a stop token (-1: it is empty); None if all do.
    """

    sequences: tuple[np.ndarray, ...]
    start: int
    keeps_prompt: bool
    wrong_end: int | None


def tokenise_rows(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], stops: set[int]
) -> Iterator[RowTokens]:
    """Yield the tokens of each row, rendered and tokenised in batches.

    The rule is that of trl: tokens after the longest common prefix of prompt and whole conversation are trained, in a
    pair after the shorter of the two. ModelError as in `_tokenised`.
    """
    for begin in range(0, len(rows), TOKENISED_TOGETHER):
        some = rows[begin : begin + TOKENISED_TOGETHER]
        settings = some[0].get(TEMPLATE_SETTINGS, {})  # the same in all rows
        tools = [tools_of(row) for row in some]
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
            yield RowTokens(
                sequences=tuple(np.array(ids, np.int32) for ids in sequences),
                start=start,
                keeps_prompt=start == len(prompt),
                wrong_end=None if wrong is None else wrong[-1] if len(wrong) > start else -1,
            )


def tokenised_dataset(rows: Sequence[RowTokens]) -> datasets.Dataset:
    """Return rows of one answer as trl takes tokenised ones: input_ids, and labels that are -100 without a loss."""
    labels = [np.concatenate([np.full(r.start, -100, np.int32), r.sequences[0][r.start :]]) for r in rows]
    columns = {"input_ids": [row.sequences[0] for row in rows], "labels": labels}
    return datasets.Dataset(pa.table({name: pa.array(c, pa.list_(pa.int32())) for name, c in columns.items()}))


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
