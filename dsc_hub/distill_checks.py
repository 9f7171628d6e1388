"""What can be wrong with a training before a weight is loaded: the recipe's `distill` section, the rows, the mask.

`python -m dsc_hub.distill_checks` reads a `distill` section as JSON from standard input and says what is wrong with it:
asked before hours are spent on chains, in a process of its own because the libraries it asks are heavy.
"""

from __future__ import annotations

import difflib
import inspect
import json
import resource
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import TemplateError
from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from trl import SFTConfig

from dsc_hub.config.messages import no_switch
from dsc_hub.config.recipe import OWNED_SFT_KEYS, quantization
from dsc_hub.errors import ConfigError, DataError, ModelError
from dsc_hub.inference.adapters import LORA_RANKS
from dsc_hub.launcher import shown_error
from dsc_hub.runs.run import Run

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
SFT_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-4,  # trl's own default, 2e-5, is for training all weights
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "packing": False,
}

_NOT_A_PLAIN_ADAPTER = "the adapter could not be served by vLLM or loaded as a plain LoRA; remove it"
_REFUSED_SFT = {
    "trust_remote_code": "a recipe is data and never runs code of others; remove it",
    "load_best_model_at_end": "no checkpoints are kept, so there is none to go back to; remove it",
    "resume_from_checkpoint": "no checkpoints are kept; remove it",
    "disable_tqdm": "dsc draws its own progress; remove it",
}
_REFUSED_LORA = {
    **dict.fromkeys(
        [
            "task_type",
            "peft_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "runtime_config",
        ],
        "set by dsc itself; remove it",
    ),
    "modules_to_save": "whole modules beside the adapter are refused by vLLM, and no embedding is resized; remove it",
    **dict.fromkeys(
        [
            "trainable_token_indices",
            "use_dora",
            "lora_bias",
            "layer_replication",
            "alora_invocation_tokens",
            "use_bdlora",
            "use_qalora",
            "target_parameters",
        ],
        _NOT_A_PLAIN_ADAPTER,
    ),
    **dict.fromkeys(
        [
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "velora_config",
            "monteclora_config",
            "arrow_config",
            "kasa_config",
            "megatron_config",
        ],
        "needs a preparation of its own, which dsc does not make; remove it",
    ),
}
_REFUSED_QUANTIZATION = {"llm_int8_enable_fp32_cpu_offload": "the model lies whole on one device; remove it"}
# What people write for keys whose names are too far from it to be guessed by their letters.
_MEANT = {
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_r": "r",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "max_seq_length": "max_length",
}
# A served adapter is added to the base as published; these inits change the base itself.
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


# -- what the recipe says


class Plan(typing.NamedTuple):
    """The recipe's three sections with our defaults under them, checked."""

    method: str
    sft: dict[str, Any]
    lora: dict[str, Any]
    quantization: dict[str, Any] | None


def plan_of(section: Mapping[str, Any]) -> Plan:
    """Check the keys and types of `distill:`; ConfigError with every problem at once."""
    problems: list[str] = []
    sft_fields = {f for f in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[f].init}
    lora_fields = {f for f in LoraConfig.__dataclass_fields__ if LoraConfig.__dataclass_fields__[f].init}
    bnb_parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    bnb_fields = {p.name for p in bnb_parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    refused_sft = _REFUSED_SFT | dict.fromkeys(OWNED_SFT_KEYS, "set by dsc itself; remove it")
    sft = _checked("sft", section["sft"], sft_fields, refused_sft, typing.get_type_hints(SFTConfig), problems)
    lora = _checked("lora", section["lora"], lora_fields, _REFUSED_LORA, typing.get_type_hints(LoraConfig), problems)
    given = _checked("quantization", section["quantization"], bnb_fields, _REFUSED_QUANTIZATION, {}, problems)

    if sft.get("packing") and sft.get("packing_strategy", "bfd") != "bfd":
        problems.append("distill.sft.packing_strategy: only 'bfd' keeps rows whole, and the end of an answer with them")
    if lora.get("init_lora_weights", True) not in _PLAIN_INITS:
        problems.append(
            "distill.lora.init_lora_weights: changes the base model, so the adapter would not fit the published one; "
            "use true, 'gaussian' or 'orthogonal'"
        )
    if lora.get("bias", "none") != "none":
        problems.append(f"distill.lora.bias: {_NOT_A_PLAIN_ADAPTER}")
    if lora.get("r", 1) < 1:
        problems.append(f"distill.lora.r: must be at least 1, got {lora['r']}")
    targets = lora.get("target_modules")
    for name in ("lm_head", "embed_tokens"):
        if isinstance(targets, (list, tuple)) and name in targets:
            problems.append(
                f"distill.lora.target_modules: '{name}' can't be adapted here; "
                "name linear layers, or leave 'all-linear'"
            )
    if (kind := given.get("bnb_4bit_quant_type", "nf4")) not in ("nf4", "fp4"):
        problems.append(f"distill.quantization.bnb_4bit_quant_type: expected nf4 or fp4, got {kind!r:.40}")
    if section["method"] == "lora" and section["quantization"]:
        problems.append("distill.quantization: has no effect with method 'lora'; remove it, or set method to 'qlora'")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems=problems)

    merged = quantization({"method": section["method"], "quantization": given})
    return Plan(section["method"], SFT_DEFAULTS | sft, LORA_DEFAULTS | lora, merged)


def _checked(
    name: str,
    given: Mapping[str, Any],
    known: Collection[str],
    refused: Mapping[str, str],
    types: Mapping[str, Any],
    problems: list[str],
) -> dict[str, Any]:
    """The section with values of the right type (YAML reads `2e-4` as text); what is wrong goes to `problems`."""
    out: dict[str, Any] = {}
    for key, value in given.items():
        where = f"distill.{name}.{key}"
        if key in refused:
            if value not in (None, False, [], {}):  # said to be off, as it is
                problems.append(f"{where}: {refused[key]}")
        elif key not in known:
            meant = _MEANT.get(key)
            close = (
                [meant] if meant in known else difflib.get_close_matches(key, sorted(set(known) - set(refused)), n=1)
            )
            problems.append(f"{where}: unknown key" + (f"; did you mean '{close[0]}'?" if close else ""))
        elif key in types:
            try:
                value = no_switch(value, types[key])
                out[key] = TypeAdapter(types[key], config=_config(types[key])).validate_python(value)
            except ValidationError as e:
                problems.append(f"{where}: {e.errors()[0]['msg'].replace('Input should', 'should')}, got {value!r}")
            except ValueError as e:
                problems.append(f"{where}: {e}")
        else:
            out[key] = value
    return out


def _config(hint: Any) -> ConfigDict | None:
    # pydantic refuses a configuration where the type is a dataclass with its own; none of our scalar keys is one.
    return None if hasattr(hint, "__dataclass_fields__") else ConfigDict(arbitrary_types_allowed=True)


# -- what the rows say


def preflight(run: Run) -> dict[str, Any]:
    """Everything that can fail before a weight is loaded: keys of the recipe, chat template, rows, mask. Takes seconds.

    Returns `rows`, `validation_rows`, `max_length` (tokens; no row is longer), `longest`, `tokens_per_epoch`,
    `trained_tokens_per_epoch`, `prompt_rerendered` (rows whose prompt the template renders otherwise once an answer
    follows), `stop_tokens`, and `table`: the first row token by token, each {text, id, trained}.

    ConfigError: unknown or refused keys. ModelError: no usable chat template. DataError: test rows, rows that are no
    conversation, do not fit `serving.context` or `sft.max_length`, train nothing, or don't train the end of the answer.
    """
    facts = run.facts
    recipe = facts["recipe"]
    plan = plan_of(recipe["distill"])
    folder = Path(facts["model"]["folder"])
    tokenizer = tokenizer_of(folder)
    stops = stop_tokens(tokenizer, folder)
    splits = rows_of(run, recipe["chain"]["system"])

    rendered = {split: [_render(tokenizer, row) for row in rows] for split, rows in splits.items()}
    everything = [r for rows in rendered.values() for r in rows]
    longest = max(len(ids) for ids, _, _ in everything)
    _check_lengths([len(ids) for ids, _, _ in everything], recipe["serving"]["context"], "serving.context")
    limit = plan.sft.get("max_length")
    if limit is not None:
        _check_lengths([len(ids) for ids, _, _ in everything], limit, "distill.sft.max_length")
    for split, rows in rendered.items():
        for number, (ids, start, _) in enumerate(rows, 1):
            if start >= len(ids):
                raise DataError(
                    f"{split} row {number}: nothing would be trained: the chat template renders no answer",
                    "Look at the model's chat_template.jinja.",
                )
            if not ends(tokenizer, ids[start:], stops):
                last = tokenizer.decode(ids[-1:])
                raise DataError(
                    f"{split} row {number}: the answer does not end with a token that ends the turn: expected one of "
                    f"{_names(tokenizer, stops)}, got {last!r}; the tuned model would never stop",
                    "The chat template and the tokenizer's eos_token (or generation_config.json) don't fit together.",
                )
    train = rendered["train"]
    ids, start, _ = train[0]
    return {
        "rows": len(train),
        "validation_rows": len(rendered["validation"]),
        "max_length": longest if limit is None else limit,
        "longest": longest,
        "truncated": 0,
        "tokens_per_epoch": sum(len(i) for i, _, _ in train),
        "trained_tokens_per_epoch": sum(len(i) - s for i, s, _ in train),
        "prompt_rerendered": sum(not same for _, _, same in train),
        "stop_tokens": _names(tokenizer, stops),
        "table": [{"text": tokenizer.decode([t]), "id": t, "trained": n >= start} for n, t in enumerate(ids)],
    }


def rows_of(run: Run, system: str | None) -> dict[str, list[dict[str, Any]]]:
    """Rows of train and validation as {prompt, completion}; validation may be empty. DataError for anything else."""
    folder = run["dataset"] / "sft"
    if found := sorted(p.name for p in folder.glob("*") if p.name.startswith("test")):
        raise DataError(
            f"test rows in the training folder: {folder / found[0]}",
            "Training never sees them: make the dataset again with `dsc run`.",
        )
    out: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for split, rows in out.items():
        path = folder / f"{split}-00000-of-00001.parquet"
        if not path.is_file():
            continue
        with path.open("rb") as file:
            content = pq.ParquetFile(file)
            columns = set(content.schema_arrow.names)
            if not content.metadata.num_rows:
                continue
            if missing := {"prompt", "completion"} - columns:
                raise DataError(
                    f"{path.name} has no column '{min(missing)}'; it has {sorted(columns)}",
                    "Make the dataset again with `dsc run`.",
                )
            table = content.read(columns=["prompt", "completion", *(["split"] if "split" in columns else [])])
        if "split" in columns and "test" in table.column("split").to_pylist():
            raise DataError(
                f"{path.name} holds test rows (column 'split')",
                "Training never sees them: make the dataset again with `dsc run`.",
            )
        for number, row in enumerate(table.select(["prompt", "completion"]).to_pylist(), 1):
            rows.append(_conversation(row, system, f"{path.name} row {number}"))
    if not out["train"]:
        raise DataError(
            "there is no row to train on",
            "Fewer constraints in the recipe's `dataset` section, or more prompts and steps, keep more chains.",
        )
    return out


def _conversation(row: Mapping[str, Any], system: str | None, where: str) -> dict[str, Any]:
    """Check one row; the recipe's system text is put in front where the row has none, as it was in generation."""
    turns = {
        name: [{"role": m["role"], "content": m["content"]} for m in row[name] or []]
        for name in ("prompt", "completion")
    }
    prompt, completion = turns["prompt"], turns["completion"]
    if not prompt or prompt[-1]["role"] != "user":
        raise DataError(
            f"{where}: expected a prompt that ends with a user turn, got roles {[m['role'] for m in prompt]}"
        )
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise DataError(
            f"{where}: expected a completion of one assistant turn, got roles {[m['role'] for m in completion]}"
        )
    if not (completion[0]["content"] or "").strip():
        raise DataError(f"{where}: the completion is empty")
    own = prompt[0]["content"] if prompt[0]["role"] == "system" else None
    if system is not None and own is None:
        prompt.insert(0, {"role": "system", "content": system})
    elif own != system and own is not None:
        raise DataError(
            f"{where}: its system text is not the recipe's chain.system",
            "Training and generation must show the model the same conversation.",
        )
    return turns


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ModelError(f"no usable tokenizer in {folder}: {str(e).splitlines()[0]}") from None
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer in {folder} has no chat template",
            "Use an instruct model, or add chat_template.jinja to its folder.",
        )
    return tokenizer


def stop_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[int]:
    """Ids that end a generation: the tokenizer's and those of generation_config.json (where chat models keep them)."""
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(folder).eos_token_id
        stops |= {more} if isinstance(more, int) else set(more or ())
    if not stops:
        raise ModelError(
            f"the model in {folder} names no token that ends an answer (eos_token)",
            "Without one a tuned model never stops.",
        )
    return stops


def _render(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> tuple[list[int], int, bool]:
    """Token ids of the row, where the trained part starts, and whether the prompt alone is rendered the same.

    The same rule as trl's: trained is what follows the longest common beginning of prompt and whole conversation.
    """
    try:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=True)[
            "input_ids"
        ]
    except TemplateError as e:
        raise ModelError(
            f"the model's chat template refuses the conversation: {e}",
            "Some templates know no system turn: leave chain.system out.",
        ) from None
    start = next((n for n, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return ids, start, start == len(prompt)


def ends(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], stops: set[int]) -> bool:
    """Does the trained part end with a stop token? Whitespace after it is the template's."""
    for token in reversed(trained):
        if token in stops:
            return True
        if tokenizer.decode([token]).strip():
            return False
    return False


def _names(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in sorted(ids)]


def _check_lengths(lengths: Sequence[int], limit: int, key: str) -> None:
    if over := sum(n > limit for n in lengths):
        raise DataError(
            f"{over} of {len(lengths)} rows are longer than {key} = {limit} tokens "
            f"(the longest has {max(lengths)}); they would lose their ends",
            f"Raise {key} to {max(lengths)}, or lower generation.max_new_tokens.",
        )


def check(section: Mapping[str, Any]) -> None:
    """Keys, types and values of `distill:`, by building the very configurations that training will build. ConfigError."""
    plan = plan_of(section)
    ways: dict[str, Callable[[], Any]] = {
        "sft": lambda: SFTConfig(output_dir="unused", use_cpu=True, report_to="none", **plan.sft),
        "lora": lambda: LoraConfig(task_type="CAUSAL_LM", **plan.lora),
        "quantization": lambda: BitsAndBytesConfig(**(plan.quantization or {})),
    }
    problems = []
    for name, build in ways.items():
        try:
            build()
        except (TypeError, ValueError, AttributeError) as e:
            problems.append(f"distill.{name}: {' '.join(str(e).split())[:300]}")
    ranks = [plan.lora["r"], *(plan.lora.get("rank_pattern") or {}).values()]
    if max(ranks) > LORA_RANKS[-1]:
        problems.append(f"distill.lora.r: vLLM serves ranks up to {LORA_RANKS[-1]}, got {max(ranks)}")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' * (len(problems) > 1)}", problems=problems)


if __name__ == "__main__":
    limit, hard_limit = int(sys.argv[1]), resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    try:
        check(json.load(sys.stdin))
    except ConfigError as error:
        print(shown_error(error))
