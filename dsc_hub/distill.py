"""Distillation: the kept answers of a run -> a LoRA adapter that gives in one generation what the chain gave.

QLoRA (Dettmers et al., arXiv:2305.14314) through trl, peft and bitsandbytes: the base model frozen in NF4, the loss on
the completion alone, rendered with the model's own chat template. Two promises are checked on the real batches before
the first step: the prompt is not trained, and the token that ends the answer is. Reads the run's recipe and the
train and validation rows of `dataset/sft`, nothing else: test rows are refused.

`python -m dsc_hub.distill RUN` trains; so does `train` in every process that accelerate or torchrun started. The parent
of such processes is `launcher.launch`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import torch
from jinja2 import TemplateError
from pydantic import ConfigDict, TypeAdapter, ValidationError

# bitsandbytes says on import that an optional package with a faster CPU kernel is missing; its own code serves as well.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from dsc_hub import progress
from dsc_hub.errors import (
    ConfigError,
    DataError,
    DscError,
    ModelError,
    RunError,
    disk_error,
)
from dsc_hub.launcher import ERROR_FILE, PROGRESS, main_process, shown_error
from dsc_hub.progress import Line, Meter, duration, moving_line, say
from dsc_hub.recipe import OWNED_SFT_KEYS
from dsc_hub.runs import Run, write_json, write_whole

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
QUANTIZATION_DEFAULTS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
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


def _plan(section: Mapping[str, Any]) -> Plan:
    """Check the keys and types of `distill:`; ConfigError with every problem at once."""
    problems: list[str] = []
    sft_fields = {f for f in SFTConfig.__dataclass_fields__ if SFTConfig.__dataclass_fields__[f].init}
    lora_fields = {f for f in LoraConfig.__dataclass_fields__ if LoraConfig.__dataclass_fields__[f].init}
    bnb_parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    bnb_fields = {p.name for p in bnb_parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    refused_sft = _REFUSED_SFT | dict.fromkeys(OWNED_SFT_KEYS, "set by dsc itself; remove it")
    sft = _checked("sft", section["sft"], sft_fields, refused_sft, typing.get_type_hints(SFTConfig), problems)
    lora = _checked("lora", section["lora"], lora_fields, _REFUSED_LORA, typing.get_type_hints(LoraConfig), problems)
    quantization = _checked("quantization", section["quantization"], bnb_fields, _REFUSED_QUANTIZATION, {}, problems)

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
    if section["method"] == "lora" and section["quantization"]:
        problems.append("distill.quantization: has no effect with method 'lora'; remove it, or set method to 'qlora'")
    if problems:
        raise ConfigError(f"distill has {len(problems)} problem{'s' if len(problems) > 1 else ''}", problems=problems)

    merged = dict(quantization)
    if not merged.get("load_in_8bit"):
        merged = QUANTIZATION_DEFAULTS | merged
    return Plan(
        section["method"], SFT_DEFAULTS | sft, LORA_DEFAULTS | lora, merged if section["method"] == "qlora" else None
    )


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
                out[key] = TypeAdapter(types[key], config=_config(types[key])).validate_python(value)
            except ValidationError as e:
                problems.append(f"{where}: {e.errors()[0]['msg'].replace('Input should', 'should')}, got {value!r}")
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
    plan = _plan(recipe["distill"])
    folder = Path(facts["model"]["folder"])
    tokenizer = _tokenizer(folder)
    stops = _stop_tokens(tokenizer, folder)
    splits = _rows(run, recipe["chain"]["system"])

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
            if not _ends(tokenizer, ids[start:], stops):
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


def _rows(run: Run, system: str | None) -> dict[str, list[dict[str, Any]]]:
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


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
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


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> set[int]:
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


def _ends(tokenizer: PreTrainedTokenizerBase, trained: Sequence[int], stops: set[int]) -> bool:
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


# -- training


def train(run: Run) -> dict[str, Any]:
    """Train the adapter and write `run["adapter"]`; returns what adapter/summary.json says.

    Called in every process of a launcher, or in one alone; the main process speaks and writes. The folder appears whole
    or not at all. ConfigError, DataError and ModelError as in `preflight`; RunError where the training itself fails.
    """
    for name, launcher in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(launcher, "").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate is configured for {name}; dsc trains a whole model in each process (DDP)",
                "Use a configuration of recipes/accelerate.",
            )
    checked = preflight(run)
    part = run["adapter"].with_name("adapter.part")
    if main_process():
        shutil.rmtree(part, ignore_errors=True)
    try:
        with _quiet():
            return _train(run, checked, part)
    except torch.cuda.OutOfMemoryError:
        raise RunError(
            "the GPU ran out of memory in training",
            "Lower distill.sft.per_device_train_batch_size and raise "
            "gradient_accumulation_steps by as much; their product is what counts.",
        ) from None
    except OSError as e:
        raise disk_error(e) or e from e
    finally:
        if main_process():
            shutil.rmtree(part, ignore_errors=True)


def _train(run: Run, checked: Mapping[str, Any], part: Path) -> dict[str, Any]:
    facts = run.facts
    recipe = facts["recipe"]
    plan, folder = _plan(recipe["distill"]), Path(facts["model"]["folder"])
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    dtype = _compute_dtype(on_cpu)
    rows = {
        split: datasets.Dataset.from_list(found) if found else None
        for split, found in _rows(run, recipe["chain"]["system"]).items()
    }
    args = _arguments(plan, checked, part, on_cpu, dtype, recipe["seed"], has_validation=rows["validation"] is not None)
    main = args.process_index == 0

    model, quantization = _base_model(plan, folder, dtype, args)
    tokenizer = _tokenizer(folder)
    vocabulary = len(tokenizer)
    lora = LoraConfig(task_type="CAUSAL_LM", **plan.lora)
    with moving_line() if main else nullcontext() as line:
        callback = _Progress(line)
        try:
            trainer = SFTTrainer(
                model=model,
                args=args,
                train_dataset=rows["train"],
                eval_dataset=rows["validation"],
                processing_class=tokenizer,
                peft_config=lora,
                callbacks=[callback],
            )
        except ValueError as e:
            if "arget modules" in str(e):  # peft: nothing, or nothing fit, under those names
                raise ConfigError(f"distill.lora.target_modules: {e}") from None
            raise
        trainer.remove_callback(PrinterCallback)
        _check_batches(trainer, _stop_tokens(tokenizer, folder), checked)
        if len(tokenizer) != vocabulary:
            raise ModelError(
                f"the trainer added {len(tokenizer) - vocabulary} tokens to the vocabulary",
                "Nothing may be resized: choose another base model.",
            )
        trainable, total = trainer.model.get_nb_trainable_parameters()
        if main:
            _say_start(checked, plan, quantization, dtype, trainable, total, args)
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started
        validation_loss = trainer.evaluate()["eval_loss"] if rows["validation"] is not None else None

    bad = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise RunError(
            f"{len(bad)} of the adapter's weights are not finite after training", "Lower distill.sft.learning_rate."
        )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    summary = {
        "rows": checked["rows"],
        "validation_rows": checked["validation_rows"],
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "first_loss": losses[0] if losses else None,
        "final_loss": sum(last) / len(last) if last else None,
        "validation_loss": validation_loss,
        "seconds": round(seconds, 2),
        "seconds_per_step": round(seconds / max(1, trainer.state.global_step), 4),
        "peak_memory_gib": _peak_memory_gib(on_cpu),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trained_tokens_per_epoch": checked["trained_tokens_per_epoch"],
        "max_length": checked["max_length"],
        "truncated": checked["truncated"],
        "method": plan.method,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
        "world_size": args.world_size,
    }
    if main:
        _write_adapter(run, trainer, folder, part, summary)
        _say_end(run, summary)
    trainer.accelerator.wait_for_everyone()
    return summary


def _compute_dtype(on_cpu: bool) -> torch.dtype:
    """bf16 where the hardware has it, else fp32: fp16 needs loss scaling, which bf16 adapter weights don't take."""
    if on_cpu:
        able = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        able = torch.cuda.is_bf16_supported()
    return torch.bfloat16 if able else torch.float32


def _arguments(
    plan: Plan,
    checked: Mapping[str, Any],
    part: Path,
    on_cpu: bool,
    dtype: torch.dtype,
    seed: int,
    has_validation: bool,
) -> SFTConfig:
    sft = dict(plan.sft)
    # Recomputing activations saves memory, which a GPU lacks and a CPU has; it costs about a fifth of the time.
    sft.setdefault("gradient_checkpointing", not on_cpu)
    sft.setdefault("dataloader_pin_memory", not on_cpu)
    sft.setdefault("ddp_find_unused_parameters", False)
    # By default a NaN is left out of the logged mean: a broken run would look healthy.
    sft["logging_nan_inf_filter"] = False
    if not has_validation:
        sft["eval_strategy"] = "no"
    sft["max_length"] = checked["max_length"]
    try:
        args = SFTConfig(
            output_dir=str(part),
            seed=seed,
            data_seed=seed,
            use_cpu=on_cpu,
            bf16=dtype is torch.bfloat16,
            fp16=False,
            completion_only_loss=True,
            report_to="none",
            push_to_hub=False,
            save_strategy="no",
            disable_tqdm=True,
            **sft,
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"distill.sft: {e}") from None
    if args.parallel_mode.value == "not_distributed":
        # One process trains on one device; with more GPUs visible, the trainer would want DataParallel, then refuse it.
        args._n_gpu = min(1, args.n_gpu)
    return args


def _base_model(plan: Plan, folder: Path, dtype: torch.dtype, args: SFTConfig) -> tuple[PreTrainedModel, str]:
    """The frozen base on this process's device, and how it is quantized, in words."""
    options: dict[str, Any] = {}
    if plan.quantization is not None:
        try:
            options["quantization_config"] = BitsAndBytesConfig(
                **{"bnb_4bit_compute_dtype": dtype, **plan.quantization}
            )
        except (TypeError, ValueError, AttributeError) as e:
            raise ConfigError(f"distill.quantization: {e}") from None
    # Never "auto": it spreads one copy over all GPUs, and every process would train with its own one of those.
    device = "cpu" if args.use_cpu else args.local_process_index
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (OSError, ImportError) as e:
        raise ModelError(f"can't load the model in {folder}: {str(e).splitlines()[0]}") from None
    if plan.quantization is None:
        return model, "none"
    layers = [m for m in model.modules() if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))]
    if not layers:
        raise ModelError(
            f"bitsandbytes quantized no layer of the model in {folder}",
            "Set distill.method to 'lora', or choose another base model.",
        )
    config = options["quantization_config"]
    if config.load_in_8bit:
        return model, f"int8, {len(layers)} layers"
    double = " with double quantization" if config.bnb_4bit_use_double_quant else ""
    return model, f"{config.bnb_4bit_quant_type}{double}, {len(layers)} layers"


def _check_batches(trainer: SFTTrainer, stops: set[int], checked: Mapping[str, Any]) -> None:
    """Collate every row as the training will, and see that the end of each answer is in the labels and no prompt is.

    ModelError otherwise. A collator that masks padding by its id also masks the end wherever the two are one token,
    and the tuned model never stops.
    """
    data = trainer.train_dataset.select_columns(
        [c for c in ("input_ids", "labels", "seq_lengths") if c in trainer.train_dataset.column_names]
    )
    trained = answers = 0
    for start in range(0, len(data), 64):
        labels = trainer.data_collator([data[i] for i in range(start, min(start + 64, len(data)))])["labels"]
        trained += int((labels != -100).sum())
        for row in labels.tolist():
            for span in _spans(row):
                answers += 1
                if not _ends(trainer.processing_class, span, stops):
                    raise ModelError(
                        f"the end of an answer is not trained: a batch's labels end with "
                        f"{trainer.processing_class.decode(span[-8:])!r}",
                        "The tuned model would never stop. "
                        "This is a fault of the trainer's collator with this tokenizer.",
                    )
    # What the preflight worked out from the template alone must be what the trainer does.
    expected = (checked["rows"], checked["trained_tokens_per_epoch"])
    if (answers, trained) != expected:
        raise ModelError(
            f"expected {expected[0]} answers with {expected[1]} trained tokens, "
            f"the trainer's batches hold {answers} with {trained}",
            "The trainer masks otherwise than the preflight; please report it.",
        )


def _spans(labels: Sequence[int]) -> Iterator[list[int]]:
    """Maximal runs of trained labels: one an answer, also where several rows are packed into one."""
    span: list[int] = []
    for label in [*labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            yield span
            span = []


# -- what is left behind


def _write_adapter(run: Run, trainer: SFTTrainer, base: Path, part: Path, summary: Mapping[str, Any]) -> None:
    """Write everything beside the final place, then move it there in one step."""
    facts = run.facts["model"]
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config["default"]
    # What others can load; peft would write the folder on this machine.
    config.base_model_name_or_path, config.revision = facts["published_as"], facts["commit"]
    # Said, because peft's "auto" asks the Hub whether the vocabulary grew; it never does here.
    model.save_pretrained(part, safe_serialization=True, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)  # peft's card says "Model Card for Model ID"; ours is written later
    written = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):  # a set in peft: its order changes from process to process
        written["target_modules"].sort()
    write_json(part / "adapter_config.json", written)

    # The base's own tokenizer, loaded again: the trainer's was used, and may have been given a pad token.
    _tokenizer(base).save_pretrained(part)
    tokenizer_config = json.loads((part / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file", "merges_file"):
        tokenizer_config.pop(key, None)  # where it lay here, which is no one's business elsewhere
    write_json(part / "tokenizer_config.json", tokenizer_config)

    history = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
    write_whole(part / "training_log.jsonl", history)
    write_json(part / "summary.json", summary)
    for path in part.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for private in {str(run.folder.resolve()), str(base.resolve()), str(base)}:
            if len(private) > 1 and private.encode() in content:
                raise RunError(
                    f"adapter/{path.name} would publish a path of this machine: {private}",
                    "Remove it from the base model's own files.",
                )
    shutil.rmtree(run["adapter"], ignore_errors=True)
    part.rename(run["adapter"])


def _peak_memory_gib(on_cpu: bool) -> float:
    """Most memory this process held: the GPU's allocations, or resident memory on the CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    return round(peak / 2**30, 2)


# -- what the user sees


class _Progress(TrainerCallback):  # type: ignore[misc]
    """The trainer's events as one line that moves; a loss that is no number ends the training."""

    def __init__(self, line: Line | None) -> None:
        self.line, self.loss, self.meter = line, "", Meter(0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter = Meter(state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise RunError(
                f"the loss is {loss} at step {state.global_step}",
                "Lower distill.sft.learning_rate, or set distill.sft.max_grad_norm.",
            )
        self.loss = f"  loss {loss:.3g}"
        self._show(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.meter.done = state.global_step
        self._show(args, state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.line is not None:
            self.line.show(f"{PROGRESS}{state.global_step}/{state.max_steps}  validation")

    def _show(self, args: TrainingArguments, state: TrainerState) -> None:
        if self.line is None or not self.meter.done:
            return
        rate = self.meter.done / max(1e-9, time.monotonic() - self.meter.started)
        self.line.show(
            f"{PROGRESS}{state.global_step}/{state.max_steps}  epoch {state.epoch or 0:.2g}/{state.num_train_epochs}"
            f"{self.loss}  {rate:.2g} step/s{self.meter.left()}"
        )


def _say_start(
    checked: Mapping[str, Any],
    plan: Plan,
    quantization: str,
    dtype: torch.dtype,
    trainable: int,
    total: int,
    args: SFTConfig,
) -> None:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    say(
        f"distill  {checked['rows']} rows, {checked['validation_rows']} for validation; "
        f"{checked['trained_tokens_per_epoch']} of "
        f"{checked['tokens_per_epoch']} tokens trained an epoch; longest row {checked['longest']} tokens, none cut"
    )
    say(
        f"distill  {plan.method}, quantization {quantization}, {str(dtype).removeprefix('torch.')} "
        f"on {args.device.type}, "
        f"{args.world_size} "
        f"process{'es' if args.world_size > 1 else ''}; "
        f"{trainable:,} of {total:,} parameters trained; {batch} rows a step"
    )
    table = checked["table"]
    first = next(n for n, token in enumerate(table) if token["trained"])
    before, after = "".join(t["text"] for t in table[max(0, first - 6) : first]), table[first:]
    end = "".join(t["text"] for t in after[-3:])
    say(
        f"distill  mask of row 1: {first} tokens not trained, up to {before!r}; "
        f"{len(after)} trained, from {after[0]['text']!r} to {end!r}"
    )
    if checked["prompt_rerendered"]:
        say(
            f"distill  the chat template renders the prompt of {checked['prompt_rerendered']} rows "
            "otherwise once an answer follows: "
            "the model is trained on a beginning that it does not see in generation"
        )


def _say_end(run: Run, summary: Mapping[str, Any]) -> None:
    def shown(loss: float | None) -> str:
        return "none" if loss is None else f"{loss:.3g}"

    say(
        f"distill  {summary['steps']} steps in {duration(summary['seconds'])}; "
        f"loss {shown(summary['first_loss'])} -> {shown(summary['final_loss'])}, "
        f"validation {shown(summary['validation_loss'])} -> {run['adapter']}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of other libraries beside our line."""
    bars, weights = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        if weights:
            transformers_logging.enable_progress_bar()


# -- as a process of its own


def main(arguments: Sequence[str]) -> int:
    """`python -m dsc_hub.distill RUN`: 0, or 2 for an error that the user can mend, said in one line."""
    if len(arguments) != 1:
        print("usage: python -m dsc_hub.distill RUN_FOLDER", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the half adapter is swept away
    error_file = os.environ.get(ERROR_FILE)
    if error_file:
        progress.PLAIN_EVERY_S = 0.5  # the launcher decides how often a person sees it
    try:
        train(Run(Path(arguments[0])))
    except DscError as e:
        if error_file:
            write_whole(Path(error_file), shown_error(e))
        elif main_process():
            print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
