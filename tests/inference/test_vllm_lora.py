"""Adapters in vLLM's CPU engine: by hand, with requests of the base and of two adapters in one batch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

# In a process of its own: the module changes vLLM, and the tests' own process should not load it.
BY_HAND = """
import torch
from vllm.lora.punica_wrapper import punica_cpu
from dsc_hub.inference import vllm_lora

class Mapping:
    index_mapping, prompt_mapping, is_prefill = INDICES, INDICES, True

class Turned:
    index_mapping, prompt_mapping, is_prefill = INDICES[::-1], INDICES[::-1], True

torch.manual_seed(0)
wrapper = punica_cpu.PunicaWrapperCPU(64, 8, "cpu", max_loras=2)
assert type(wrapper).add_lora_linear is vllm_lora.add_lora_linear
wrapper.update_metadata(Mapping, [11, 12], 2, 100)
x = torch.randn(6, 32)
a = tuple(torch.randn(2, 1, 8, 32) for _ in range(2))
b = (torch.randn(2, 1, 24, 8), torch.randn(2, 1, 16, 8))
y = torch.randn(6, 40)
expected = y.clone()
for row, adapter in enumerate(INDICES):
    if adapter:
        k = adapter - 11
        for start, part in ((0, 0), (24, 1)):
            change = 0.5 * b[part][k, 0] @ (a[part][k, 0] @ x[row])
            expected[row, start : start + len(change)] += change
before = y.clone()
wrapper.add_lora_linear(y, x, a, b, 0.5, (24, 16))
torch.testing.assert_close(y, expected)

# Other weights in the same tensors, and other requests in the next batch, as vLLM writes them.
with torch.inference_mode():
    for part in (0, 1):
        for k in (0, 1):
            b[part][k].copy_(2 * b[part][k])
    again = before.clone()
    wrapper.add_lora_linear(again, x, a, b, 0.5, (24, 16))
    torch.testing.assert_close(again, before + 2 * (expected - before))
    wrapper.update_metadata(Turned, [11, 12], 2, 100)
    again = before.clone()
    wrapper.add_lora_linear(again, x.flip(0), a, b, 0.5, (24, 16))
    torch.testing.assert_close(again, before + 2 * (expected - before).flip(0))
wrapper.update_metadata(Mapping, [11, 12], 2, 100)

output, expected = torch.randn(2, 1, 40, 8), torch.zeros(6, 40)
for row, adapter in enumerate(INDICES):
    if adapter:
        expected[row] = output[adapter - 11, 0] @ (a[0][adapter - 11, 0] @ x[row])
logits = torch.zeros(6, 40)
wrapper.add_lora_logits(logits, x, a[0], output, 1.0)
torch.testing.assert_close(logits, expected)

embedded, rows = torch.zeros(6, 40), torch.randn(6, 8)
expected = torch.zeros(6, 40)
for row, adapter in enumerate(INDICES):
    if adapter:
        expected[row] = output[adapter - 11, 0] @ rows[row]
wrapper.add_lora_embedding(embedded, rows, output, True)
torch.testing.assert_close(embedded, expected)

# Of a prompt's tokens vLLM gives the indices of the batch's requests: clear only if they are all of one model.
more, logits = torch.randn(9, 32), torch.zeros(9, 40)
wrapper.add_lora_logits(logits, more, a[0] * 0, output * 0, 1.0)  # no adapted output layer
assert not logits.any()
try:
    wrapper.add_lora_logits(logits, more, a[0], output, 1.0)
except RuntimeError:
    assert len(set(INDICES)) > 1
else:
    assert len(set(INDICES)) == 1 and logits.any() == (INDICES[0] > 0)
print("right")
"""


@pytest.mark.parametrize("adapters", [[0, 11, 12, 0, 12, 11], [0] * 6, [11] * 6], ids=["mixed", "base alone", "one"])
def test_each_request_gets_its_own_adapter_and_the_base_none(adapters: list[int]):
    code = BY_HAND.replace("INDICES", str(adapters))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("right"), done.stderr
