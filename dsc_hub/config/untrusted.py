"""Limits on recipes written by others: which settings they may contain, and the error that lists the others.

Such a recipe is data. It may define prompts, scoring and training. It may not name servers, keys, local folders, code
or files outside its own folder, nor the destination and visibility of what is published. Of the settings that are
passed unchanged to a server or a library, it may set numbers and names. The user's overrides are exempt.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsc_hub.config import recipe, recipe_files
from dsc_hub.config.publishing import PUBLISHERS_OWN, PublishConfig
from dsc_hub.config.recipe import Recipe
from dsc_hub.config.sampling import ScorerConfig
from dsc_hub.config.serving import CRITICS_OWN, SERVERS, SERVERS_OWN, CriticConfig, ServingConfig
from dsc_hub.config.training import OBJECTIVES
from dsc_hub.errors import ConfigError
from dsc_hub.system import plain_yaml

LARGEST_RECIPE = 100_000  # maximum bytes of a recipe.yaml
MOST_VALUES, LONGEST_TEXT = 64, 200  # limits of a setting that is passed to a server or library
_FILE_NAME = re.compile(r"[\w][\w .-]*")
_NAME = re.compile(r"[\w.-]{1,64}")
# A name at an API is only ever sent to it.
_SOURCE = re.compile(r"(?:package:)?\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?|api:\w[\w./:@-]{0,199}")
_OURS = "servers and keys are this machine's business"

# Sampling parameters of vLLM and similar servers. Others can make a server download files, run grammars for minutes,
# use tools or another model.
EXTRA = frozenset(
    "top_k min_p typical_p repetition_penalty presence_penalty frequency_penalty length_penalty min_tokens ignore_eos "
    "stop stop_token_ids bad_words logit_bias skip_special_tokens spaces_between_special_tokens add_generation_prompt "
    "chat_template_kwargs reasoning_effort".split()
)
TRAINER = frozenset(
    "learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size"
    " gradient_accumulation_steps warmup_steps warmup_ratio lr_scheduler_type weight_decay adam_beta1 adam_beta2"
    " adam_epsilon max_grad_norm optim max_length packing packing_strategy padding_free logging_steps eval_strategy"
    " eval_steps load_best_model_at_end metric_for_best_model gradient_checkpointing label_smoothing_factor"
    " neftune_noise_alpha train_sampling_strategy loss_type tf32 seed beta label_smoothing disable_dropout"
    " desirable_weight undesirable_weight".split()
)
LORA = frozenset("r lora_alpha lora_dropout bias use_rslora use_dora target_modules modules_to_save".split())
MOST_OF_A_JUDGE = {"votes": 16, "max_tokens": 8192}
# A key of chat_template_kwargs that a server treats as more than a setting, beside NO_TEMPLATE_SETTINGS.
_NOT_FOR_TEMPLATES = frozenset({"documents"})


def check_downloaded(path: Path, where: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a recipe in a folder downloaded from `where` contains settings that are not allowed."""
    reference = f"{path}, downloaded from {where},"
    hint = f"To make it your own, with all that it names: `dsc recipes adopt {shlex.quote(str(path.parent))}`"
    downloaded = read_untrusted(reference, path, overrides, hint)
    for name in filter(None, (downloaded.prompts.path, downloaded.prompts.values)):
        if not (path.parent / name).resolve().is_relative_to(path.resolve().parent):
            raise ConfigError(f"{reference} is refused: its prompt file '{name}' is a link out of its folder", hint)


def read_untrusted(reference: str, path: Path, overrides: Sequence[str] = (), hint: str = "") -> Recipe:
    """Return the recipe in a file written by others, without the overrides.

    ConfigError, with `hint`, for a setting that is not allowed and that none of the `overrides` replaces.
    """
    check_text(reference, path)
    written = recipe_files.load_recipe_file(path)
    check_untrusted(reference, written, overrides, hint)
    return written


def check_untrusted(reference: str, written: Recipe, overrides: Sequence[str] = (), hint: str = "") -> None:
    """Raise ConfigError for settings that a recipe of others may not contain and none of the `overrides` replaces."""
    keys = [o.partition("=")[0].strip() for o in overrides]
    problems = [
        f"{key}: {reason}"
        for key, reason in _problems(written)
        if not any(key == k or key.startswith(f"{k}.") for k in keys)
    ]
    if problems:
        raise ConfigError(
            f"{reference} is refused: a pulled recipe may not set these; give them as overrides", hint, problems
        )


def read_to_compare(reference: str, path: Path) -> Recipe:
    """Return the recipe in a file written by others, for callers that run nothing and contact no server.

    They only read its prompt file. ConfigError for invalid YAML, or a prompt file outside the recipe's folder.
    """
    check_text(reference, path)
    written = recipe_files.load_recipe_file(path)
    if problems := [f"{key}: {reason}" for key, reason in _prompt_files(written)]:
        raise ConfigError(f"{reference} is refused", problems=problems)
    return written


def _prompt_files(written: Recipe) -> Iterator[tuple[str, str]]:
    for name in ("path", "values"):
        if (file := getattr(written.prompts, name)) and not _FILE_NAME.fullmatch(file):
            yield f"prompts.{name}", f"'{file}' is not a file beside the recipe"


def _sources(written: Recipe, scorers: Mapping[str, ScorerConfig]) -> dict[str, str]:
    """Return the sources of weights by their key."""
    models = {"model": written.model, "student": written.student}
    return {f"{place}.source": section.source for place, section in models.items() if section} | {
        f"{place}.scorer": s.scorer for place, s in scorers.items()
    }


def _problems(written: Recipe) -> Iterator[tuple[str, str]]:
    """Yield each setting that is not allowed: the key, and the reason."""
    yield from _prompt_files(written)
    scorers = recipe.all_scorers(written)
    for key, source in _sources(written, scorers).items():
        if recipe.is_folder(source):
            yield key, f"'{source:.100}' is a local folder"
        elif not _SOURCE.fullmatch(source):
            yield key, f"'{source:.100}' is no name of a scorer, a package or a model of the Hub"
    for place, section in scorers.items():
        if section.metric.endswith(".py"):
            yield f"{place}.metric", f"'{section.metric}' is code; ask for it as a Space of the Hub"
        for key in SERVERS:
            if key in section.options:
                yield f"{place}.options.{key}", _OURS
        for key, most in MOST_OF_A_JUDGE.items():
            value = section.options.get(key, 1)
            if not isinstance(value, int) or value > most:
                yield (
                    f"{place}.options.{key}",
                    f"at most {most} without your leave, got {value!r:.40}: it is your server's time",
                )
    for key in SERVERS_OWN:
        if getattr(written.serving, key) != getattr(ServingConfig(), key):
            yield f"serving.{key}", _OURS
    if critic := written.chain.critic:
        for key in CRITICS_OWN:
            if getattr(critic, key) != getattr(CriticConfig(model=critic.model), key):
                yield f"chain.critic.{key}", _OURS
        yield from _passed_on("chain.critic.extra", critic.extra, EXTRA)
    for key in PUBLISHERS_OWN:
        if getattr(written.publish, key) != getattr(PublishConfig(), key):
            yield f"publish.{key}", "where it goes and who may see it is for you to say"
    yield from _passed_on("generation.extra", written.generation.extra, EXTRA)
    if written.distill.launch is not None:
        yield "distill.launch", "how training is started is this machine's business"
    if written.distill.report_to != "none":
        yield "distill.report_to", "where its curves go is for you to say"
    for name in OBJECTIVES:
        yield from _passed_on(f"distill.{name}", getattr(written.distill, name), TRAINER)
    yield from _passed_on("distill.lora", written.distill.lora, LORA)
    yield from _passed_on("distill.quantization", written.distill.quantization, QUANTIZATION)


def _passed_on(section: str, settings: dict[str, Any], allowed: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the problems in settings that are passed unchanged to a server or a library.

    These are keys that are not allowed, and values other than numbers, names and lists of them (a path would be opened,
    an expression evaluated, a pattern matched).
    """
    for key, value in settings.items():
        if key not in allowed or (isinstance(value, dict) and _NOT_FOR_TEMPLATES & value.keys()):
            yield f"{section}.{key}", "not a setting that a pulled recipe may pass on"
        elif not _is_plain(value, section):
            yield f"{section}.{key}", f"expected numbers, names or a list of them, got {value!r:.60}"


def _is_plain(value: Any, section: str) -> bool:
    if isinstance(value, dict):  # chat_template_kwargs, logit_bias
        return section.endswith(".extra") and len(value) <= MOST_VALUES and all(map(_is_one, value.values()))
    values = value if isinstance(value, list) else [value]
    if section.endswith(".extra") and all(isinstance(v, str) for v in values):  # `stop` may be any text
        return len(values) <= MOST_VALUES and all(len(v) <= LONGEST_TEXT for v in values)
    return len(values) <= MOST_VALUES and all(map(_is_one, values))


def _is_one(value: Any) -> bool:
    plain = value is None or isinstance(value, (bool, int, float))
    return plain or (isinstance(value, str) and bool(_NAME.fullmatch(value)))


def check_text(reference: str, path: Path) -> None:
    """Raise ConfigError for a recipe file that is not plain YAML (`plain_yaml`), before it is parsed as a recipe."""
    if (size := path.stat().st_size) > LARGEST_RECIPE:
        raise ConfigError(f"{reference}: its recipe.yaml has {size:,} bytes, at most {LARGEST_RECIPE:,} are read")
    try:
        plain_yaml.load_plain_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return  # reported when it is loaded
    except ValueError as e:
        raise ConfigError(f"{reference}: its recipe.yaml can't be read: {e}") from None


# -- what adopting a folder permits


def reach_of(folder: Path) -> list[str]:
    """Return what the files of a downloaded folder would contact, read and run, one line each."""
    out = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".yaml", ".yml", ".py") or p.is_symlink()):
        name = path.relative_to(folder)
        if path.is_symlink():
            out.append(f"{name}  is a link to {path.resolve()}")
        elif path.suffix == ".py":
            out.append(f"{name}  is code, which a recipe may name as a metric")
        else:
            out += [f"{name}  {line}" for line in _reach_of_file(path)]
    return out


def _reach_of_file(path: Path) -> list[str]:
    try:
        check_text(str(path), path)
        return _reach(recipe_files.load_recipe_file(path))
    except ConfigError as e:
        return [f"is no recipe ({e.message.rpartition('/')[2]}); a grid may set any key of one"]


def _reach(written: Recipe) -> list[str]:
    """Return what a recipe would contact, read and run beyond the Hub, one line each; empty if nothing."""
    scorers, publish = recipe.all_scorers(written), written.publish
    out = [f"asks {s.address} with the key in {s.key_name} ({s.place})" for s in recipe.servers(written)]
    for key, source in _sources(written, scorers).items():
        if recipe.is_folder(source):
            out.append(f"loads the local folder {source} ({key})")
    for place, section in scorers.items():
        if section.metric.endswith(".py"):
            out.append(f"runs the code in {section.metric} ({place}.metric)")
    out += [f"reads {name}" for name in (written.prompts.path, written.prompts.values) if name]
    if publish.to != "none":
        visibility = "privately" if publish.private else "PUBLICLY"
        names = ", ".join(filter(None, recipe.repo_names(written).values()))
        out.append(f"publishes {visibility} to {publish.to} as {publish.owner or 'your own account'}: {names}")
        if publish.metrics:
            out += [f"publishes {file} as a Space" for file in recipe.metric_files(written).values()]
    return out


QUANTIZATION = frozenset(  # settings of bitsandbytes that a recipe of others may contain
    "load_in_4bit load_in_8bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype "
    "bnb_4bit_quant_storage "
    "llm_int8_threshold".split()
)
