"""Conversion of base model weights to the format that is served and trained on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsc_hub.config.training import DistillConfig, quantization
from dsc_hub.errors import ModelError
from dsc_hub.system import machine
from dsc_hub.system.cache import cache_home, writable_home
from dsc_hub.system.endings import shown_ending
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.locks import locked
from dsc_hub.system.progress import say

# What a tokenizer consists of, in whatever format.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
FORMAT = 2  # of converted models; increase it when their files change
COMPLETE = "complete.json"  # marker of a converted model, written last


def evaluation_weights(folder: Path, identity: str, distill: DistillConfig, which: str = "rounded") -> tuple[Path, str]:
    """Return the weights that all arms of an evaluation run on, and their description.

    With QLoRA these are the rounded weights that the adapter was trained on, unless `which` (`evaluation.weights`) is
    "original"; else the base model's own.
    """
    settings = quantization(distill)
    if settings is None:
        return folder, "in bfloat16"
    if which == "original":
        return folder, "in bfloat16, not rounded as in the adapter's training"
    kind = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4")).upper()
    return (
        quantise_roundtrip(folder, identity, settings),
        f"rounded to {kind} and back to bfloat16, as the adapter was trained on",
    )


def _rounded_name(identity: str, settings: Mapping[str, Any]) -> str:
    settings_json = json.dumps(settings, sort_keys=True)
    return f"rounded-{hashlib.sha256(f'{FORMAT} {identity} {settings_json}'.encode()).hexdigest()[:16]}"


def is_rounded(identity: str, distill: DistillConfig) -> bool:
    """Return whether the weights as training sees them are there: in the cache, or the model's own."""
    settings = quantization(distill)
    return settings is None or (cache_home() / "models" / _rounded_name(identity, settings) / COMPLETE).is_file()


def quantise_roundtrip(folder: Path, identity: str, settings: Mapping[str, Any]) -> Path:
    """Return the model with its weights as QLoRA sees them: quantised by bitsandbytes and dequantised; bf16, cached.

    An adapter trained on the quantised base fits these weights, not the original ones. `identity` is that of the model,
    `settings` the arguments of BitsAndBytesConfig. ModelError if the conversion fails.
    """
    settings_json = json.dumps(settings, sort_keys=True)
    name = _rounded_name(identity, settings)
    description = {"identity": identity, "quantization": dict(settings)}
    return converted(name, "quantise_weights", [str(folder), settings_json], description, f"the model in {folder}")


def converted(name: str, function: str, arguments: list[str], about: Mapping[str, Any], what: str) -> Path:
    """Return the cached folder `name`; if missing, create it with `function(*arguments, folder)` of this module.

    Runs in a child process, so that torch is not loaded into this one. A second process waits for the first one's
    folder.
    """
    folder = cache_home() / "models" / name
    if not (folder / COMPLETE).is_file():
        writable_home()
        with locked(
            folder.with_name(f".{name}.lock"), on_wait=lambda _: say(f"waits: another process converts {what}")
        ):
            if not (folder / COMPLETE).is_file():
                _convert(folder, function, arguments, about, what)
    return folder


def _convert(folder: Path, function: str, arguments: list[str], about: Mapping[str, Any], what: str) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir()
    try:
        _in_child(function, [*arguments, str(part)], what)
    except ModelError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    (part / COMPLETE).write_text(json.dumps(about))
    shutil.rmtree(folder, ignore_errors=True)  # without its marker: incomplete
    part.rename(folder)


def _in_child(function: str, arguments: list[str], what: str) -> None:
    """Run a function of this module in a child process. ModelError with its last line if it fails."""
    hidden = {} if function == "quantise_weights" else {"CUDA_VISIBLE_DEVICES": ""}
    code = f"import sys; from {__name__} import {function}; {function}(*sys.argv[1:])"
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**machine.for_child(os.environ), "HF_HUB_OFFLINE": "1", **hidden},
    )
    if child.returncode < 0:
        raise ModelError(
            f"could not convert {what}: the process was ended by {shown_ending(child.returncode)}",
            "Free some memory, or choose a smaller model.",
        )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"could not convert {what}: {last}", "It needs the packages gguf, torch and transformers.")


def quantise_weights(source: str, settings: str, target: str) -> None:
    """Write a model folder whose linear layers were quantised by bitsandbytes and dequantised again."""
    from dsc_hub.inference.bitsandbytes_import import import_bitsandbytes

    import_bitsandbytes()  # before transformers does
    from dsc_hub.inference.rounding import round_model

    if not round_model(Path(source), json.loads(settings), Path(target)):
        _quantise_loaded(source, settings, target)


def _quantise_loaded(source: str, settings: str, target: str) -> None:
    """Do the same with the whole model in memory, plain and quantised."""
    import bitsandbytes as bnb
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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
    _save(model, source, target)


def _save(model: Any, source: str, target: str) -> None:
    """Write a changed model with the tokenizer and the generation settings of the folder that it was loaded from."""
    from transformers import GenerationConfig

    model.config._name_or_path = ""
    model.generation_config = GenerationConfig()  # of its own one, transformers refuses to write what it has read
    model.save_pretrained(target)
    (Path(target) / "generation_config.json").unlink(missing_ok=True)
    copy_matching(Path(source), Path(target), (*TOKENIZER_FILES, "generation_config.json"))


def copy_matching(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files of a folder that match one of the patterns, byte for byte."""
    for path in {p for pattern in patterns for p in source.glob(pattern) if p.is_file()}:
        shutil.copyfile(path, target / path.name)


def dequantise(gguf: str, target: str) -> None:
    """Write a GGUF file as a plain bf16 model folder: safetensors, tokenizer, chat template."""
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    # transformers 5.19 reads the file anew for configuration, tokenizer and weights, and makes the table of tensor
    # names for each module: a third of the time.
    for name in ("GGUFReader", "get_tensor_name_map"):
        setattr(library, name, functools.cache(getattr(library, name)))
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
    _make_readable(Path(target))


def _make_readable(folder: Path) -> None:
    """Rewrite what transformers 5 writes and other readers (transformers 4, llama.cpp, mlx) do not know."""
    config = read_object(folder / "config.json")
    config.pop("_model_name_or_path", None)  # the name in the GGUF file
    # transformers 4 reads rope_theta, and without it takes 10,000.
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = theta
    write_json(folder / "config.json", config)
    tokenizer = read_object(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    write_json(folder / "tokenizer_config.json", tokenizer)
