"""Conversion of base model weights to the format that is served and trained on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsc_hub.config.recipe import DistillConfig, quantization
from dsc_hub.errors import ModelError
from dsc_hub.system.cache import cache_home
from dsc_hub.system.files import locked
from dsc_hub.system.machine import for_child
from dsc_hub.system.progress import say


def evaluation_weights(folder: Path, identity: str, distill: DistillConfig) -> tuple[Path, str]:
    """Return the weights that all arms of an evaluation run on, and their description.

    With QLoRA these are the rounded weights that the adapter was trained on, else the base model's own.
    """
    settings = quantization(distill)
    if settings is None:
        return folder, "in bfloat16"
    kind = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4")).upper()
    return quantise_roundtrip(
        folder, identity, settings
    ), f"rounded to {kind} and back to bfloat16, as the adapter was trained on"


def quantise_roundtrip(folder: Path, identity: str, settings: Mapping[str, Any]) -> Path:
    """Return the model with its weights as QLoRA sees them: quantised by bitsandbytes and dequantised; bf16, cached.

    An adapter trained on the quantised base fits these weights, not the original ones. `identity` is that of the model,
    `settings` the arguments of BitsAndBytesConfig. ModelError if the conversion fails.
    """
    settings_json = json.dumps(settings, sort_keys=True)
    name = f"rounded-{hashlib.sha256(f'{identity} {settings_json}'.encode()).hexdigest()[:16]}"
    description = {"identity": identity, "quantization": dict(settings)}
    return converted(name, "quantise_weights", [str(folder), settings_json], description, f"the model in {folder}")


def converted(name: str, function: str, arguments: list[str], about: Mapping[str, Any], what: str) -> Path:
    """Return the cached folder `name`; if missing, create it with `function(*arguments, folder)` of this module.

    Runs in a child process, so that torch is not loaded into this one. A second process waits for the first one's folder.
    """
    folder = cache_home() / "models" / name
    if not (folder / "complete.json").is_file():
        with locked(folder.with_name(f".{name}.lock"), on_wait=lambda: say(f"waits: another process converts {what}")):
            if not (folder / "complete.json").is_file():
                _convert(folder, function, arguments, about, what)
    return folder


def _convert(folder: Path, function: str, arguments: list[str], about: Mapping[str, Any], what: str) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    code = f"import sys; from {__name__} import {function}; {function}(*sys.argv[1:])"
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments, str(part)],
        capture_output=True,
        text=True,
        env={**for_child(os.environ), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    if child.returncode:
        shutil.rmtree(part, ignore_errors=True)
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"could not convert {what}: {last}", "It needs the packages gguf, torch and transformers.")
    (part / "complete.json").write_text(json.dumps(about))
    shutil.rmtree(folder, ignore_errors=True)  # without its marker: incomplete
    part.rename(folder)


def quantise_weights(source: str, settings: str, target: str) -> None:
    """Write a model folder whose linear layers were quantised by bitsandbytes and dequantised again."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options = {"dtype": torch.bfloat16, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    config = BitsAndBytesConfig(**{"bnb_4bit_compute_dtype": torch.bfloat16, **json.loads(settings)})
    quantised = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map={"": "cpu"}, **options
    )
    plain = dict(model.named_parameters())
    for name, layer in quantised.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            weight = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
        else:
            continue
        with torch.no_grad():
            plain[f"{name}.weight"].copy_(weight.reshape(plain[f"{name}.weight"].shape))
    model.config._name_or_path = ""
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False).save_pretrained(target)


def dequantise(gguf: str, target: str) -> None:
    """Write a GGUF file as a plain bf16 model folder: safetensors, tokenizer, chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    folder, file = str(Path(gguf).parent), Path(gguf).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
