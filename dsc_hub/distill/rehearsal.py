"""A rehearsal of the training before hours of sampling: all of it, on a one-layer model and a few made-up rows.

    python -m dsc_hub.distill.rehearsal BYTES

reads {section, recipe, folder, has_validation} as JSON from standard input, checks the `distill` section, prints the
shapes of the training (`TrainingSize`) and `REHEARSES`, trains one step in a temporary folder, and prints the error as
JSON if there is one. `recipe` is null if only the section is to be checked. BYTES limits the memory. It runs in its own
process, because the libraries are heavy.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.inference.bitsandbytes_import import import_bitsandbytes

import_bitsandbytes()  # before transformers does

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.training import DistillConfig
from dsc_hub.distill.config import BY_OBJECTIVE, check_section, checked_targets, has_fused_experts, lora_config, plan_of
from dsc_hub.distill.launcher import REHEARSES, shown_error
from dsc_hub.distill.memory import TrainingSize
from dsc_hub.errors import ConfigError, DscError
from dsc_hub.runs.run import Run
from dsc_hub.system import machine

MADE_UP_ROWS = 4
# One step of one row: what a setting does to the machinery shows as well as with many.
SHORT = {"max_steps": 1, "gradient_accumulation_steps": 1}
NOT_REHEARSED = {"launch": None, "report_to": "none", "validation_prompts": None}
BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size")


def rehearse(recipe: Recipe, folder: Path, has_validation: bool) -> None:
    """Train one step with the recipe's settings, on a model of the same configuration with one layer.

    ConfigError with what the training would have said; other DscErrors as the training itself raises them.
    """
    from dsc_hub.distill.train import train

    with tempfile.TemporaryDirectory(prefix="dsc-") as work, warnings.catch_warnings(action="ignore"), refused(recipe):
        model = _one_layer(folder, Path(work) / "model")
        train(_made_up_run(recipe, model, Path(work) / "run", has_validation))


@contextlib.contextmanager
def refused(recipe: Recipe) -> Iterator[None]:
    """Raise whatever the libraries raise as a ConfigError with what the training would have said."""
    try:
        yield
    except (DscError, MemoryError):
        raise
    except Exception as e:  # of the libraries: they would raise it after hours, too
        said = " ".join(str(e).split())[:300]
        raise ConfigError(
            f"training would fail with these settings: {type(e).__name__}: {said}",
            f"Take those out of distill.{recipe.distill.objective}, lora and quantization that you did not mean to"
            " change.",
        ) from e


def size_of(recipe: Recipe, folder: Path) -> TrainingSize:
    """Return the shapes of the whole model's training, from its configuration: no weight is allocated."""
    import torch
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    plan = plan_of(recipe.distill)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_config(config)
        wide = set(get_keys_to_not_convert(model))
        linear = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name not in wide]
        parameters = sum(p.numel() for p in model.parameters())
        quantised = sum(m.in_features * m.out_features for m in linear) if plan.quantization is not None else 0
        with checked_targets():
            adapted = get_peft_model(model, lora_config(plan.lora, model))
        has_experts = has_fused_experts(model)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    text = config.get_text_config()
    return TrainingSize(
        parameters=parameters,
        quantised=quantised,
        bits=8 if (plan.quantization or {}).get("load_in_8bit") else 4,
        trained=trained,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        recomputes=bool(plan.settings.get("gradient_checkpointing", not machine.vllm_on_cpu())),
        has_experts=has_experts,
    )


def _one_layer(folder: Path, target: Path) -> Path:
    """Write a model with the configuration and the tokenizer of `folder`, but one layer and random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if getattr(part, "num_hidden_layers", 1) > 1:
            part.num_hidden_layers = 1
            if getattr(part, "layer_types", None):
                part.layer_types = part.layer_types[:1]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(target)
    for file in folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not (target / file.name).exists():
            shutil.copy(file, target)
    return target


def _made_up_run(recipe: Recipe, model: Path, folder: Path, has_validation: bool) -> Run:
    run = Run(folder)
    name = recipe.distill.objective
    objective = BY_OBJECTIVE[name]
    given = {k: v for k, v in getattr(recipe.distill, name).items() if k != "metric_for_best_model"}
    settings = given | SHORT | dict.fromkeys(BATCHES, 2 if name == "kto" else 1)
    distill = recipe.distill.model_copy(update={name: settings, "processes": 1} | NOT_REHEARSED)
    rows = [
        {"prompt": [{"role": "user", "content": f"Say {n}."}], "reward": n / MADE_UP_ROWS}
        | {column: [{"role": "assistant", "content": f"{column} {n}."}] for column in objective.answers}
        for n in range(MADE_UP_ROWS)
    ]
    folder_of_rows = run["dataset"] / objective.rows
    folder_of_rows.mkdir(parents=True)
    for split in ("train", "validation") if has_validation else ("train",):
        pq.write_table(pa.Table.from_pylist(rows), folder_of_rows / f"{split}-00000-of-00001.parquet")
    run.add_facts(
        recipe=recipe.model_copy(update={"distill": distill}).model_dump(mode="json"),
        identity={},
        model={"source": "", "id": "rehearsal", "commit": "", "folder": str(model), "published_as": "rehearsal"},
        versions={},
        hardware={"cpu": "", "cores": 1, "memory_gib": 0, "gpus": []},
        repos={"owner": "", "dataset": "", "adapter": "", "base": None},
        started_at="",
    )
    return run


def main(arguments: list[str], given: dict[str, Any]) -> None:
    limit, hard_limit = int(arguments[0]), resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    out = sys.stdout
    sys.stdout = sys.stderr  # the libraries print, too
    try:
        check_section(DistillConfig.model_validate(given["section"]))
        if given["recipe"]:
            recipe, folder = Recipe.model_validate(given["recipe"]), Path(given["folder"])
            with refused(recipe):
                print(size_of(recipe, folder).model_dump_json(), file=out)
            print(REHEARSES, file=out, flush=True)
            rehearse(recipe, folder, given["has_validation"])
    except DscError as error:
        print(shown_error(error), file=out)


if __name__ == "__main__":
    main(sys.argv[1:], json.load(sys.stdin))
