"""The loss mask on the trainer's own batches: prompts are not trained, and the end of every answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dsc_hub.distill.preflight import TrainingData, ends
from dsc_hub.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

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
    for start in range(0, len(data), 64):
        labels = _labels(trainer.data_collator([data[i] for i in range(start, min(start + 64, len(data)))]))
        trained += int((labels != -100).sum())
        for row in labels.tolist():
            for span in answer_spans(row):
                answers += 1
                if not ends(trainer.processing_class, span, stops):
                    raise ModelError(
                        f"the end of an answer is not trained: a batch's labels end with "
                        f"{trainer.processing_class.decode(span[-8:])!r}",
                        "The tuned model would never stop. "
                        "This is a fault of the trainer's collator with this tokenizer.",
                    )
    # The preflight's result from the template alone must match the trainer's batches.
    if (answers, trained) != (expected.answers, expected.trained_tokens_per_epoch):
        raise ModelError(
            f"expected {expected.answers} answers with {expected.trained_tokens_per_epoch} trained tokens, "
            f"the trainer's batches hold {answers} with {trained}",
            "The trainer masks otherwise than the preflight; please report it.",
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
