"""The files of a trained adapter: weights, configuration, tokenizer, training log. Written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel
from transformers import Trainer

from dsc_hub.errors import RunError
from dsc_hub.inference.weights import TOKENIZER_FILES, copy_matching
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_object, write_json, write_whole

if TYPE_CHECKING:
    import torch

# Keys of an adapter_config.json that peft has read since 0.13.
CLASSIC = frozenset(
    "peft_type task_type auto_mapping base_model_name_or_path revision inference_mode r lora_alpha lora_dropout"
    " target_modules bias fan_in_fan_out init_lora_weights modules_to_save rank_pattern alpha_pattern use_rslora"
    " use_dora layers_to_transform layers_pattern".split()
)
_LOCAL_NAMES = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file")


def _copy_tokenizer(base: Path, part: Path) -> None:
    """Copy the base's tokenizer byte for byte; only names of local files are taken out, which are not published."""
    copy_matching(base, part, TOKENIZER_FILES)
    file = part / "tokenizer_config.json"
    if file.is_file():
        config = read_object(file)
        if local := [key for key in _LOCAL_NAMES if os.path.isabs(str(config.get(key) or ""))]:
            write_json(file, {k: v for k, v in config.items() if k not in local})


def write_adapter(
    run: Run, trainer: Trainer, weights: dict[str, torch.Tensor], base: Path, part: Path, training: Training
) -> None:
    """Write all files to the temporary folder `part`, then move it to the final path in one step.

    `weights` are the trained parameters by their names in the trainer's model.
    """
    facts = run.facts.base
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config["default"]
    # A name that others can load; peft would write the local folder.
    config.base_model_name_or_path, config.revision = facts.published_as, facts.published_commit
    # Explicit, because peft's "auto" queries the Hub whether the vocabulary grew; it never does here.
    model.save_pretrained(part, state_dict=weights, safe_serialization=True, save_embedding_layers=False)
    (part / "README.md").unlink(missing_ok=True)  # peft's placeholder card; the real card is written later
    written = json.loads((part / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(written["target_modules"], list):  # a set in peft, whose order differs between processes
        written["target_modules"].sort()
    defaults = {f.name: f.default for f in fields(LoraConfig) if f.name not in CLASSIC}
    # Older peft refuses keys that it does not know, also at their default.
    written = {k: v for k, v in written.items() if k != "peft_version" and not (k in defaults and v == defaults[k])}
    write_json(part / "adapter_config.json", written)

    _copy_tokenizer(base, part)

    history = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
    write_whole(part / "training_log.jsonl", history)
    write_json(part / "summary.json", training.model_dump())
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
