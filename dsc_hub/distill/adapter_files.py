"""The files of a trained adapter: weights, configuration, tokenizer, training log. Written whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft import PeftModel
from trl import SFTTrainer

from dsc_hub.distill.preflight import tokenizer_of
from dsc_hub.errors import RunError
from dsc_hub.runs.metrics_schema import Training
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_json, write_whole


def write_adapter(run: Run, trainer: SFTTrainer, base: Path, part: Path, training: Training) -> None:
    """Write all files to the temporary folder `part`, then move it to the final path in one step."""
    facts = run.facts.model
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model: PeftModel = trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config["default"]
    # A name that others can load; peft would write the local folder.
    config.base_model_name_or_path, config.revision = facts.published_as, facts.published_commit
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
