"""Weights as QLoRA sees them: quantised by bitsandbytes and dequantised again, one file of weights at a time.

Runs in a child process (`weights.quantise_roundtrip`). On a GPU where there is one, as training quantises there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from dsc_hub.system.files import read_object, write_json

DTYPE = torch.bfloat16
_LINEAR = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def round_model(source: Path, settings: Mapping[str, Any], target: Path) -> bool:
    """Write the model in `source` with rounded weights to `target`; return whether it could be done.

    Memory for one file of weights is needed. False, with nothing written, if the files name their tensors otherwise
    than the model names its layers: then only the loaded model knows which tensor is which.
    """
    config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": DTYPE, **settings})
    rounded, kept = _layers(source, config)
    files = sorted(source.glob("*.safetensors"))
    if not rounded <= {name for file in files for name in _names(file)}:
        return False
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            out = {
                name: _converted(tensors.get_tensor(name), name in rounded, name in kept, config, device)
                for name in tensors.keys()  # noqa: SIM118 (the file can't be iterated)
            }
            save_file(out, target / file.name, metadata={"format": "pt"})
    _copy_the_rest(source, target)
    return True


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def _layers(source: Path, config: BitsAndBytesConfig) -> tuple[set[str], set[str]]:
    """Return the names of the tensors that are quantised, and of those that keep their dtype; reads no weights."""
    about = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(about, dtype=DTYPE)
    AutoHfQuantizer.from_config(config).preprocess_model(model, device_map={"": "cpu"})
    rounded = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, _LINEAR)}
    wide = {
        part
        for a in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for part in getattr(model, a, None) or ()
    }
    return rounded, {name for name, _ in model.named_parameters() if wide & set(name.split("."))}


def _converted(
    tensor: torch.Tensor, is_rounded: bool, is_kept: bool, config: BitsAndBytesConfig, device: str
) -> torch.Tensor:
    if is_kept or not tensor.is_floating_point():
        return tensor
    return _rounded(tensor.to(device, DTYPE), config).cpu() if is_rounded else tensor.to(DTYPE)


def _rounded(weight: torch.Tensor, config: BitsAndBytesConfig) -> torch.Tensor:
    """Return a bf16 weight quantised and dequantised, with its own layer's block sizes and offsets."""
    if config.load_in_8bit:
        quantised, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
        return bnb.functional.int8_vectorwise_dequant(quantised, scales).to(DTYPE)
    layer = bnb.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
    ).to(weight.device)
    return bnb.functional.dequantize_4bit(layer.data, layer.quant_state).reshape(weight.shape).to(DTYPE)


def _copy_the_rest(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer and index; the configuration names the dtype of the weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py"):
            shutil.copyfile(path, target / path.name)
    config = read_object(target / "config.json")
    for part in (config, *(v for k, v in config.items() if k.endswith("_config") and isinstance(v, dict))):
        part |= {key: "bfloat16" for key in ("dtype", "torch_dtype") if key in part}
    if "torch_dtype" not in config:
        config["dtype"] = "bfloat16"
    write_json(target / "config.json", config)
