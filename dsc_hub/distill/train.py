"""Distillation: train a LoRA adapter on the kept answers of a run, so that one generation replaces the chain.

QLoRA (Dettmers et al., arXiv:2305.14314) with trl, peft and bitsandbytes: the base model is frozen in NF4, the loss
covers only the completion, and rows are rendered with the model's chat template. Two properties are checked on the real
batches before the first step: the prompt is not trained, and the token that ends the answer is. Reads only the run's
recipe and the train and validation rows of `dataset/sft`; test rows are refused.

`python -m dsc_hub.distill.train RUN` trains; so does `train` in every process that accelerate or torchrun started.
`launcher.launch` is the parent of such processes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch

# On import bitsandbytes warns that an optional faster CPU kernel is missing; its own code suffices.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda r: "gemm_4bit_forward" not in r.getMessage())

import bitsandbytes as bnb
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from dsc_hub.distill.config import Plan, plan_of
from dsc_hub.distill.launcher import ERROR_FILE, PROGRESS, main_process, shown_error
from dsc_hub.distill.preflight import check_training, ends, stop_tokens, tokenizer_of, training_rows
from dsc_hub.errors import (
    ConfigError,
    DscError,
    ModelError,
    RunError,
    disk_error,
)
from dsc_hub.runs.run import Run
from dsc_hub.system import machine, progress
from dsc_hub.system.files import write_json, write_whole
from dsc_hub.system.progress import Line, Meter, duration, moving_line, say

# -- training


def train(run: Run) -> dict[str, Any]:
    """Train the adapter, write `run["adapter"]` and return the contents of adapter/summary.json.

    Called in every process of a launcher, or in a single one; only the main process prints and writes. The folder is
    written atomically. ConfigError, DataError and ModelError as in `check_training`; RunError if the training itself
    fails.
    """
    for name, launcher in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(launcher, "").lower() in ("true", "1"):
            raise ConfigError(
                f"accelerate is configured for {name}; dsc trains a whole model in each process (DDP)",
                "Use a configuration of recipes/accelerate.",
            )
    checked = check_training(run)
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
    plan, folder = plan_of(recipe["distill"]), Path(facts["model"]["folder"])
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    dtype = _compute_dtype(on_cpu)
    rows = {
        split: datasets.Dataset.from_list(split_rows) if split_rows else None
        for split, split_rows in training_rows(run, recipe["chain"]["system"]).items()
    }
    args = _arguments(plan, checked, part, on_cpu, dtype, recipe["seed"], has_validation=rows["validation"] is not None)
    main = args.process_index == 0

    model, quantization = _base_model(plan, folder, dtype, args)
    tokenizer = tokenizer_of(folder)
    vocabulary = len(tokenizer)
    with moving_line() if main else nullcontext() as line:
        trainer = _trainer(plan, model, args, rows, tokenizer, _Progress(line))
        if dtype is torch.float32:
            _widen_adapter(trainer.model)
        _check_batches(trainer, stop_tokens(tokenizer, folder), checked)
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

    _check_finite(trainer.model)
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


def _trainer(
    plan: Plan, model: Any, args: SFTConfig, rows: Mapping[str, Any], tokenizer: Any, callback: TrainerCallback
) -> SFTTrainer:
    """Build trl's trainer; ConfigError if the adapter's target modules do not fit the model."""
    try:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **plan.lora),
            callbacks=[callback],
        )
    except ValueError as e:
        if "arget modules" in str(e):  # peft: the names match no module, or none that fits
            raise ConfigError(f"distill.lora.target_modules: {e}") from None
        raise
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_finite(model: Any) -> None:
    """RunError if training left weights of the adapter that are not finite."""
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise RunError(
            f"{len(bad)} of the adapter's weights are not finite after training", "Lower distill.sft.learning_rate."
        )


def _compute_dtype(on_cpu: bool) -> torch.dtype:
    """Return bf16 if the hardware has it, else fp32: fp16 needs loss scaling, which bf16 adapters do not allow."""
    if on_cpu:
        return getattr(torch, machine.cpu_dtype())
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32


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
    # Recomputing activations saves memory, which is scarce only on GPUs; it costs about a fifth of the time.
    sft.setdefault("gradient_checkpointing", not on_cpu)
    sft.setdefault("dataloader_pin_memory", not on_cpu)
    sft.setdefault("ddp_find_unused_parameters", False)
    # By default NaN losses are left out of the logged mean, so a diverged run would look healthy.
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
        # One process trains on one device; with more visible GPUs the trainer would try DataParallel, then refuse it.
        args._n_gpu = min(1, args.n_gpu)
    return args


def _base_model(plan: Plan, folder: Path, dtype: torch.dtype, args: SFTConfig) -> tuple[PreTrainedModel, str]:
    """Return the frozen base on this process's device, and a description of its quantization."""
    options: dict[str, Any] = {}
    if plan.quantization is not None:
        try:
            options["quantization_config"] = BitsAndBytesConfig(
                **{"bnb_4bit_compute_dtype": dtype, **plan.quantization}
            )
        except (TypeError, ValueError, AttributeError) as e:
            raise ConfigError(f"distill.quantization: {e}") from None
    # Not "auto": it spreads one copy over all GPUs, in every process.
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


def _widen_adapter(model: torch.nn.Module) -> None:
    """Convert the adapter's weights to float32.

    With a quantized base the trainer makes them bfloat16. Processors without bfloat16 instructions multiply these with
    a slow generic routine (it took 60 % of a step's time).
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _check_batches(trainer: SFTTrainer, stops: set[int], checked: Mapping[str, Any]) -> None:
    """Collate every row as in training; check that the labels hold the end of each answer and no prompt.

    ModelError otherwise. A collator that masks padding by its id also masks the end token if both are the same token,
    and the tuned model then never stops.
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
                if not ends(trainer.processing_class, span, stops):
                    raise ModelError(
                        f"the end of an answer is not trained: a batch's labels end with "
                        f"{trainer.processing_class.decode(span[-8:])!r}",
                        "The tuned model would never stop. "
                        "This is a fault of the trainer's collator with this tokenizer.",
                    )
    # The preflight's result from the template alone must match the trainer's batches.
    expected = (checked["rows"], checked["trained_tokens_per_epoch"])
    if (answers, trained) != expected:
        raise ModelError(
            f"expected {expected[0]} answers with {expected[1]} trained tokens, "
            f"the trainer's batches hold {answers} with {trained}",
            "The trainer masks otherwise than the preflight; please report it.",
        )


def _spans(labels: Sequence[int]) -> Iterator[list[int]]:
    """Yield the maximal spans of trained labels: one per answer, even if several rows are packed into one."""
    span: list[int] = []
    for label in [*labels, -100]:
        if label != -100:
            span.append(label)
        elif span:
            yield span
            span = []


# -- output files


def _write_adapter(run: Run, trainer: SFTTrainer, base: Path, part: Path, summary: Mapping[str, Any]) -> None:
    """Write all files to the temporary folder `part`, then move it to the final path in one step."""
    facts = run.facts["model"]
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config["default"]
    # A name that others can load; peft would write the local folder.
    config.base_model_name_or_path, config.revision = facts["published_as"], facts["published_commit"]
    # Explicit, because peft's "auto" queries the Hub whether the vocabulary grew; it never does here.
    model.save_pretrained(part, safe_serialization=True, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)  # peft's placeholder card; the real card is written later
    written = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):  # a set in peft, whose order differs between processes
        written["target_modules"].sort()
    write_json(part / "adapter_config.json", written)

    # The base's tokenizer, loaded again: the trainer may have added a pad token to its copy.
    tokenizer_of(base).save_pretrained(part)
    tokenizer_config = json.loads((part / "tokenizer_config.json").read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "vocab_file", "merges_file"):
        tokenizer_config.pop(key, None)  # local paths are not published
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
    """Return the peak memory of this process in GiB: GPU allocations, or resident memory on the CPU."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    return round(peak / 2**30, 2)


# -- user output


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Callback that shows the trainer's events as a progress line; a non-finite loss ends the training."""

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
        f"on {args.device.type}, {args.world_size} "
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
    """Disable the progress bars of other libraries."""
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


# -- entry point of the process


def main(arguments: Sequence[str]) -> int:
    """`python -m dsc_hub.distill.train RUN`: return 0, or 2 for an error that the user can fix, printed in one line."""
    if len(arguments) != 1:
        print("usage: python -m dsc_hub.distill.train RUN_FOLDER", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises SystemExit, so that the partial adapter is removed
    error_file = os.environ.get(ERROR_FILE)
    if error_file:
        progress.PLAIN_EVERY_S = 0.5  # the launcher throttles the output
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
