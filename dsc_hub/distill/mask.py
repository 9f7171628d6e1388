"""The loss mask on the trainer's own batches: prompts are not trained, and the end of every answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsc_hub.distill.preflight import TrainingData
from dsc_hub.distill.tokens import ends
from dsc_hub.errors import ModelError

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import Trainer

BATCH = 256  # rows that are collated together
SAMPLE = 1024  # rows that are collated, of those that the preflight tokenised
READ_TOGETHER = 10_000  # rows whose labels are counted together
# Columns of a tokenised row that the collators of the objectives read.
_TOKENS = (
    "input_ids",
    "labels",
    "seq_lengths",
    "weight",
    "prompt_ids",
    "completion_ids",
    "chosen_ids",
    "rejected_ids",
    "label",
)


class _Trained(NamedTuple):
    """How many answers labels hold, and how many tokens with a loss."""

    answers: int
    tokens: int


def check_batches(trainer: Trainer, stops: set[int], expected: TrainingData) -> None:
    """Check that the trainer's batches hold the end of each answer and no prompt; ModelError otherwise.

    Rows that the preflight tokenised are counted as they lie in the trainer's dataset, and SAMPLE of them are collated;
    others are all collated. A collator that masks padding by its id also masks the end token if both are the same
    token, and the tuned model then never stops.
    """
    data = trainer.train_dataset.select_columns([c for c in _TOKENS if c in trainer.train_dataset.column_names])
    of_preflight = _Trained(expected.answers, expected.trained_tokens_per_epoch)
    in_sample = of_preflight
    if "labels" in data.column_names:
        _check_count(_in_dataset(data), of_preflight)
        if len(data) > SAMPLE:
            data = data.select(np.linspace(0, len(data) - 1, SAMPLE, dtype=int))
            in_sample = _in_dataset(data)
    _check_count(_in_batches(trainer, data, stops), in_sample)


def _check_count(got: _Trained, expected: _Trained) -> None:
    if got != expected:
        raise ModelError(
            f"expected {expected.answers} answers with {expected.tokens} trained tokens, "
            f"the trainer's batches hold {got.answers} with {got.tokens}",
            "The trainer masks otherwise than the preflight; please report it.",
        )


def _in_dataset(data: datasets.Dataset) -> _Trained:
    """Count what the labels of a tokenised dataset hold."""
    answers = tokens = 0
    for block in data.select_columns("labels").with_format("arrow").iter(READ_TOGETHER):
        lists = block.column("labels").combine_chunks()
        is_trained = lists.flatten().to_numpy() != -100
        is_followed = np.append(is_trained[1:], False)
        is_followed[np.cumsum(lists.value_lengths().to_numpy()) - 1] = False  # a list's last token
        answers, tokens = answers + int((is_trained & ~is_followed).sum()), tokens + int(is_trained.sum())
    return _Trained(answers, tokens)


def _in_batches(trainer: Trainer, data: datasets.Dataset, stops: set[int]) -> _Trained:
    """Collate rows as in training and count what the batches hold; ModelError if an answer's end is not trained."""
    answers = tokens = 0
    for columns in data.iter(BATCH):
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        labels = _labels(trainer.data_collator(rows)).numpy()
        is_trained = labels != -100
        is_last = is_trained & ~np.pad(is_trained[:, 1:], ((0, 0), (0, 1)))
        answers, tokens = answers + int(is_last.sum()), tokens + int(is_trained.sum())
        if not np.isin(labels[is_last], list(stops)).all():
            _check_spans(trainer, labels, stops)
    return _Trained(answers, tokens)


def _check_spans(trainer: Trainer, labels: np.ndarray, stops: set[int]) -> None:
    """ModelError unless each answer ends with a stop token; whitespace of the template may follow it."""
    tokenizer = trainer.processing_class
    for span in (span for row in labels.tolist() for span in answer_spans(row)):
        if not ends(tokenizer, span, stops):
            raise ModelError(
                f"the end of an answer is not trained: a batch's labels end with {tokenizer.decode(span[-8:])!r}",
                "The tuned model would never stop. This is a fault of the trainer's collator with this tokenizer.",
            )


def _labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the labels of a batch, (rows, tokens); -100 where there is no loss. Preference batches have a mask."""
    if "labels" in batch:
        return batch["labels"]
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def answer_spans(labels: Sequence[int]) -> Iterator[list[int]]:
    """Yield the maximal spans of trained labels: one per answer, even if several rows are packed into one."""
    span: list[int] = []
    for label in [*labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            yield span
            span = []
