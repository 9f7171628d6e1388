"""A recipe that somebody else wrote is data: what it may set, and the error that lists what it may not.

It may say what is asked, scored and learned. It may not name servers, keys, local folders, code or files outside its own, nor
where things go and who may see them; and of the settings that reach a server or a library as they are, it may set those that
are numbers and names. What the user overrides is the user's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsc_hub import models, recipe, recipe_files
from dsc_hub.errors import ConfigError
from dsc_hub.metrics.identity import SERVERS
from dsc_hub.recipe import Recipe

LARGEST = 100_000  # bytes of a recipe.yaml
DEEPEST = 20  # levels of brackets and indentation in it
MOST_VALUES, LONGEST_TEXT = 64, 200  # of a setting that is passed on
_FILE_NAME = re.compile(r"[\w][\w .-]*")
_NAME = re.compile(r"[\w.-]{1,64}")
_OURS = "servers and keys are this machine's business"

# Sampling parameters of vLLM and its kin. Others can make a server fetch, run grammars for minutes, use tools or another model.
EXTRA = frozenset(
    "top_k min_p typical_p repetition_penalty presence_penalty frequency_penalty length_penalty min_tokens ignore_eos stop "
    "stop_token_ids bad_words logit_bias skip_special_tokens spaces_between_special_tokens add_generation_prompt "
    "chat_template_kwargs reasoning_effort".split()
)
SFT = frozenset(
    "learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "warmup_steps warmup_ratio lr_scheduler_type weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim max_length "
    "packing packing_strategy padding_free logging_steps eval_strategy eval_steps gradient_checkpointing label_smoothing_factor "
    "neftune_noise_alpha group_by_length loss_type tf32 seed".split()
)
LORA = frozenset("r lora_alpha lora_dropout bias use_rslora use_dora target_modules modules_to_save".split())
QUANTIZATION = frozenset(
    "load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "llm_int8_threshold".split()
)


def check_downloaded(path: Path, where: str, overrides: Sequence[str]) -> None:
    """ConfigError if a recipe in a folder that was downloaded from `where` sets what somebody else's may not."""
    reference = f"{path}, downloaded from {where},"
    try:
        downloaded = read(reference, path, overrides)
        for name in filter(None, (downloaded.prompts.path, downloaded.prompts.values)):
            if not (path.parent / name).resolve().is_relative_to(path.resolve().parent):
                raise ConfigError(f"{reference} is refused: its prompt file '{name}' is a link out of its folder")
    except ConfigError as e:
        hint = f"To make it your own, with all that it names: `dsc recipes adopt {shlex.quote(str(path.parent))}`"
        raise ConfigError(e.message, hint, e.problems) from None


def read(reference: str, path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file that somebody else wrote, as it stands there. ConfigError if it sets what it may not and none of the
    `overrides` sets anew."""
    _check_text(reference, path)
    written = recipe_files.load(path)
    keys = [o.partition("=")[0].strip() for o in overrides]
    problems = [
        f"{key}: {told}"
        for key, told in _problems(written)
        if not any(key == k or key.startswith(f"{k}.") for k in keys)
    ]
    if problems:
        raise ConfigError(
            f"{reference} is refused: a pulled recipe may not set these; give them as overrides", problems=problems
        )
    return written


def read_to_compare(reference: str, path: Path) -> Recipe:
    """The recipe in a file that somebody else wrote, for who runs nothing by it and asks no server, but reads its prompt file.
    ConfigError for a text that is no plain one, or a prompt file that is not beside it."""
    _check_text(reference, path)
    written = recipe_files.load(path)
    if problems := [f"{key}: {told}" for key, told in _prompt_files(written)]:
        raise ConfigError(f"{reference} is refused", problems=problems)
    return written


def _prompt_files(written: Recipe) -> Iterator[tuple[str, str]]:
    for name in ("path", "values"):
        if (file := getattr(written.prompts, name)) and not _FILE_NAME.fullmatch(file):
            yield f"prompts.{name}", f"'{file}' is not a file beside the recipe"


def _problems(written: Recipe) -> Iterator[tuple[str, str]]:
    """What it may not set: the key, and why."""
    yield from _prompt_files(written)
    scorers = recipe.all_scorers(written)
    sources = {"model.source": written.model.source} | {f"{place}.scorer": s.scorer for place, s in scorers.items()}
    for key, source in sources.items():
        if models.is_folder(source):
            yield key, f"'{source}' is a local folder"
    for place, section in scorers.items():
        if section.metric.endswith(".py"):
            yield f"{place}.metric", f"'{section.metric}' is code; ask for it as a Space of the Hub"
        for key in SERVERS:
            if key in section.options:
                yield f"{place}.options.{key}", _OURS
    for key in ("endpoints", "served_model", "api_key_env"):
        if getattr(written.serving, key) != getattr(recipe.Serving(), key):
            yield f"serving.{key}", _OURS
    if critic := written.chain.critic:
        for key in SERVERS:
            if getattr(critic, key) != getattr(recipe.Critic(model=critic.model), key):
                yield f"chain.critic.{key}", _OURS
    for key in recipe.PUBLISHERS_OWN:
        if getattr(written.publish, key) != getattr(recipe.Publish(), key):
            yield f"publish.{key}", "where it goes and who may see it is for you to say"
    yield from _passed_on("generation.extra", written.generation.extra, EXTRA)
    yield from _passed_on("distill.sft", written.distill.sft, SFT)
    yield from _passed_on("distill.lora", written.distill.lora, LORA)
    yield from _passed_on("distill.quantization", written.distill.quantization, QUANTIZATION)


def _passed_on(section: str, settings: dict[str, Any], allowed: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Of settings that reach a server or a library as they are: keys that are not allowed, and values that are more than
    numbers, names and lists of them (a path is opened there, an expression evaluated, a pattern matched)."""
    for key, value in settings.items():
        if key not in allowed:
            yield f"{section}.{key}", "not a setting that a pulled recipe may pass on"
        elif not _is_plain(value, section):
            yield f"{section}.{key}", f"expected numbers, names or a list of them, got {value!r:.60}"


def _is_plain(value: Any, section: str) -> bool:
    inside: list[Any] = [value]
    if isinstance(value, list):
        inside = value
    elif isinstance(value, dict) and section.endswith(".extra"):  # chat_template_kwargs, logit_bias
        inside = list(value.values())
    return len(inside) <= MOST_VALUES and all(_is_one(v, section) for v in inside)


def _is_one(value: Any, section: str) -> bool:
    if isinstance(value, str):  # `stop` has any text
        return len(value) <= LONGEST_TEXT if section.endswith(".extra") else bool(_NAME.fullmatch(value))
    return value is None or isinstance(value, (bool, int, float))


def _check_text(reference: str, path: Path) -> None:
    """ConfigError, before it is parsed, for a recipe that is no plain one: too large, too deep, or with aliases, by which a few
    lines can stand for gigabytes. One pass by libyaml's scanner, which is linear."""
    if (size := path.stat().st_size) > LARGEST:
        raise ConfigError(f"{reference}: its recipe.yaml has {size:,} bytes, at most {LARGEST:,} are read")
    depth = 0
    try:
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{reference}: its recipe.yaml has YAML aliases, expected every value written out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ConfigError(f"{reference}: its recipe.yaml is nested more than {DEEPEST} deep")
    except (yaml.YAMLError, ValueError):
        return  # reported when it is loaded
