"""The memory that a training needs, from the shapes of the model, before any weight is loaded.

An estimate for decoders of the usual form: it is held against measured peaks in tests/distill/test_memory.py.
"""

from __future__ import annotations

from pydantic import BaseModel

GIB = 2**30
LIBRARIES = 0.9 * GIB  # of a process on the CPU: torch, transformers, trl; on a GPU the context of CUDA
BYTES_4BIT = 0.53  # of a quantised parameter, its scales included
OPTIMIZER = 16  # bytes for each trained parameter: weight, gradient and two moments, in float32
LOGITS = 10  # bytes for each token and word of the vocabulary: in two bytes, in four, and their gradient
# Bytes that one layer keeps for the gradient, for each token: so much times the hidden size, and times the inner size
# of its feed-forward part. Inputs of the linear layers and of the norms, and what LoRA and its dropout keep.
PER_HIDDEN, PER_INNER = 56, 16
# On a CPU freed memory is kept (launcher.py), in pieces that the next batch may not fit: 12.5 GiB instead of 10.7 with
# rows of 1 to 12 times a length.
KEPT_ON_CPU = 1.2
BETWEEN = 2  # with recomputation: bytes for each token, layer and hidden unit, and one whole layer


class TrainingSize(BaseModel):
    """The shapes of a training. `parameters` are the base's, of which `quantised` ones are stored in `bits` bits;
    `trained` are the adapter's. `has_experts`: experts in one tensor a layer, neither quantised nor adapted."""

    parameters: int
    quantised: int
    bits: int
    trained: int
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    recomputes: bool
    has_experts: bool = False

    @property
    def quantised_share(self) -> float:
        return self.quantised / self.parameters


def peak_bytes(size: TrainingSize, rows: int, length: int, wide_bytes: int) -> float:
    """Return about how many bytes a training process needs at its peak.

    `rows` are those of one step, `length` the tokens of the longest; `wide_bytes` those of a parameter that is not
    quantised: 2 in bfloat16, 4 in float32.
    """
    tokens = rows * length
    quantised_bytes = {4: BYTES_4BIT, 8: 1.0}.get(size.bits, float(wide_bytes))
    weights = size.quantised * quantised_bytes + (size.parameters - size.quantised) * wide_bytes
    width = wide_bytes / 2
    layer = tokens * (PER_HIDDEN * size.hidden + PER_INNER * size.inner) * width
    kept = layer + tokens * size.layers * size.hidden * BETWEEN * width if size.recomputes else layer * size.layers
    return LIBRARIES + weights + size.trained * OPTIMIZER + kept + tokens * size.vocabulary * LOGITS
