"""What `dsc plan` says before a run."""

from __future__ import annotations

from pathlib import Path

from dsc_hub.pipeline.preflight import adapter_bytes
from dsc_hub.system.files import write_json

# SmolLM2-135M: its LoRA of rank 16 has 4,884,480 parameters.
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def test_the_disk_for_checkpoints_is_planned_for_the_adapter_that_will_be_trained(tmp_path: Path):
    assert adapter_bytes(tmp_path, 16) is None  # no config.json
    write_json(tmp_path / "config.json", SMOLLM2)
    assert adapter_bytes(tmp_path, 16) == 4_884_480 * 3 * 16
    assert adapter_bytes(tmp_path, 32) == 2 * 4_884_480 * 3 * 16
    assert adapter_bytes(tmp_path, "16") is None
    write_json(tmp_path / "config.json", SMOLLM2 | {"num_hidden_layers": None})
    assert adapter_bytes(tmp_path, 16) is None
