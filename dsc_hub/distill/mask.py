"""The loss mask on the trainer's own batches: prompts are not trained, and the end of every answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsc_hub.distill.preflight import TrainingData, ends
from dsc_hub.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

BATCH = 256  # rows that are collated together
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


def check_batches(trainer: Trainer, stops: set[int], expected: TrainingData) -> None:
    """Collate every row as in training; check that the labels hold the end of each answer and no prompt.

    ModelError otherwise. A collator that masks padding by its id also masks the end token if both are the same token,
    and the tuned model then never stops.
    """
    data = trainer.train_dataset.select_columns([c for c in _TOKENS if c in trainer.train_dataset.column_names])
    trained = answers = 0
    for start in range(0, len(data), BATCH):
        columns = data[start : start + BATCH]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        labels = _labels(trainer.data_collator(rows)).numpy()
        is_trained = labels != -100
        is_last = is_trained & ~np.pad(is_trained[:, 1:], ((0, 0), (0, 1)))
        trained, answers = trained + int(is_trained.sum()), answers + int(is_last.sum())
        if not np.isin(labels[is_last], list(stops)).all():
            _check_spans(trainer, labels, stops)
    # The preflight's result from the template alone must match the trainer's batches.
    if (answers, trained) != (expected.answers, expected.trained_tokens_per_epoch):
        raise ModelError(
            f"expected {expected.answers} answers with {expected.trained_tokens_per_epoch} trained tokens, "
            f"the trainer's batches hold {answers} with {trained}",
            "The trainer masks otherwise than the preflight; please report it.",
        )


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
