"""Weights are rounded file by file as bitsandbytes rounds a whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsc_hub.config.training import DistillConfig
from dsc_hub.inference import weights
from dsc_hub.inference.rounding import round_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def model_in(folder: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size="80KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "settings",
    [NF4, NF4 | {"bnb_4bit_use_double_quant": False}, NF4 | {"bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}],
)
@pytest.mark.parametrize(("dtype", "tied"), [(torch.bfloat16, True), (torch.float32, False)])
def test_file_by_file_gives_the_weights_of_the_loaded_model(tmp_path: Path, settings, dtype, tied: bool):
    source, whole, split = model_in(tmp_path / "source", dtype, tied), tmp_path / "whole", tmp_path / "split"
    split.mkdir()
    assert len(list(source.glob("*.safetensors"))) > 3
    assert round_model(source, settings, split)
    weights._quantise_loaded(str(source), json.dumps(settings), str(whole))
    expected, found = tensors(whole), tensors(split)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)
    changed = [n for n, t in tensors(source).items() if not torch.equal(found[n], t.to(torch.bfloat16))]
    assert len(changed) == 3 * 7 and all(".mlp." in n or ".self_attn." in n for n in changed)


def test_the_folder_loads_as_a_bfloat16_model_with_the_files_of_its_base(tmp_path: Path):
    source, target = model_in(tmp_path / "source", torch.float32), tmp_path / "target"
    target.mkdir()
    round_model(source, NF4, target)
    assert {p.name for p in source.iterdir()} == {p.name for p in target.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16 and model.config.to_dict()["dtype"] == "bfloat16"


def test_files_that_name_their_tensors_otherwise_are_left_to_the_loaded_model(tmp_path: Path):
    source, target = model_in(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    for file in source.glob("*.safetensors"):
        with safe_open(file, framework="pt") as old:
            renamed = {name.replace("self_attn", "attention"): old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
        save_file(renamed, file)
    assert not round_model(source, NF4, target) and list(target.iterdir()) == []


def test_an_evaluation_may_run_on_the_original_weights(tmp_path: Path):
    folder, about = weights.evaluation_weights(tmp_path, "m@c", DistillConfig(), "original")
    assert folder == tmp_path and "not rounded" in about
    assert weights.evaluation_weights(tmp_path, "m@c", DistillConfig(method="lora"), "original")[1] == "in bfloat16"
