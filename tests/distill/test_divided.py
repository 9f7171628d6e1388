"""A model that is divided among the processes of a training (FSDP2).

Accelerate divides models on GPUs only. PyTorch does it on CPUs as well, so the processes here are told to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsc_hub.config.recipe import Recipe
from dsc_hub.distill import plugin
from dsc_hub.distill.model import adapter_weights, set_adapter_weights
from dsc_hub.errors import ConfigError
from dsc_hub.runs.run import Run
from dsc_hub.system.files import packaged_folder
from tests import fixture_run
from tests.distill.test_checkpoints import SLOW, losses, saved, wait_for_step
from tests.distill.tiny import make_run, pair, row

ALSO_ON_CPUS = """
from accelerate import state
from accelerate.utils import DistributedType

made = state.AcceleratorState.__init__

def divided(self, *args, fsdp_plugin=None, **more):
    made(self, *args, fsdp_plugin=fsdp_plugin, **more)
    self.distributed_type = DistributedType.FSDP
    self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")
    state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

state.AcceleratorState.__init__ = divided
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def start(run: Run, script: Path, *, divided: bool, every_s: str = "1000") -> subprocess.Popen[str]:
    script.write_text((ALSO_ON_CPUS if divided else "") + SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | (FSDP if divided else {})
    return subprocess.Popen(
        [*command, str(script), str(run.folder), every_s, "float32"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(child: subprocess.Popen[str], run: Run) -> str:
    output, _ = child.communicate(timeout=400)
    assert run["adapter"].exists(), output
    return output


def small_run(folder: Path, base: Path, objective: str = "sft", **section) -> Run:
    of_row = row if objective == "sft" else pair
    settings = {
        "max_steps": 6,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    return make_run(
        folder,
        base,
        rows=[of_row(n) for n in range(16)],
        validation=[of_row(n) for n in range(20, 23)],
        config="sft" if objective == "sft" else "preference",
        lora={"lora_dropout": 0.0},
        processes=2,
        objective=objective,
        **{objective: settings},
        **section,
    )


def check_same(divided: Run, whole: Run, base: Path) -> None:
    """The same losses, and an adapter with the same weights that loads."""
    assert losses(divided) == pytest.approx(losses(whole), rel=1e-4)
    summaries = [json.loads((run["adapter"] / "summary.json").read_text()) for run in (divided, whole)]
    same = ("trainable_parameters", "total_parameters", "world_size", "steps", "best_step")
    assert [summaries[0][key] for key in same] == [summaries[1][key] for key in same]
    weights = [load_file(run["adapter"] / "adapter_model.safetensors") for run in (divided, whole)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert weight.shape == weights[1][name].shape
        assert (weight.float() - weights[1][name].float()).abs().max() < 2e-3, name
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), divided["adapter"])


@pytest.mark.long
def test_divided_quantised_weights_are_trained_as_whole_ones_and_a_killed_training_goes_on(tmp_path: Path, base: Path):
    divided, whole = (small_run(tmp_path / name, base) for name in ("divided", "whole"))
    child = start(divided, tmp_path / "divided.py", divided=True, every_s="0")
    wait_for_step(divided, 3, child)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=400)
    assert saved(divided) and not divided["adapter"].exists()
    output = finish(start(divided, tmp_path / "divided.py", divided=True), divided)
    assert "goes on from checkpoint-" in output
    finish(start(whole, tmp_path / "whole.py", divided=False), whole)
    check_same(divided, whole, base)


@pytest.mark.long
@pytest.mark.parametrize(("objective", "method"), [("sft", "lora"), ("dpo", "qlora"), ("kto", "qlora")])
def test_each_objective_trains_a_divided_model_as_a_whole_one(tmp_path: Path, base: Path, objective: str, method: str):
    runs = {name: small_run(tmp_path / name, base, objective, method=method) for name in ("divided", "whole")}
    for name, run in runs.items():
        finish(start(run, tmp_path / f"{name}.py", divided=name == "divided"), run)
    check_same(runs["divided"], runs["whole"], base)


def recipe_with(rounds: int = 1, **distill) -> Recipe:
    recipe = Recipe.model_validate(fixture_run.facts()["recipe"])
    section = recipe.distill.model_copy(update=distill)
    return recipe.model_copy(update={"distill": section, "rounds": rounds})


@pytest.mark.parametrize(
    ("settings", "recipe", "message"),
    [
        ({"distributed_type": "DEEPSPEED"}, {}, "DDP or FSDP2"),
        ({"distributed_type": "MEGATRON_LM"}, {}, "DDP or FSDP2"),
        ({"distributed_type": "FSDP"}, {}, "version 1 of FSDP"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True}},
            {},
            "renames the adapter's weights",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
            {},
            "can't be gathered",
        ),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, {}, "version 1 of FSDP"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {"validation_prompts": 8}, "can't be gener"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, {"rounds": 2}, "can't be generated"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            {"quantization": {"load_in_8bit": True}},
            "8 bits can't be divided",
        ),
    ],
)
def test_what_a_divided_model_can_not_do_is_refused_from_the_configuration_and_from_the_launcher(
    settings, recipe, message
):
    with pytest.raises(ConfigError, match=message):
        plugin.check_configuration(recipe_with(**recipe), settings)
    options = settings.get("fsdp_config") or {"fsdp_version": 1}
    launched = {f"ACCELERATE_USE_{settings['distributed_type']}": "true", "WORLD_SIZE": "2"}
    launched |= {name.upper(): str(value).lower() for name, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        plugin.check_launched(recipe_with(**recipe), launched)
    plugin.check_launched(recipe_with(**recipe), {})


def test_an_fsdp_section_that_is_no_section_is_an_error_for_the_user():
    with pytest.raises(ConfigError, match="expected settings, got 'x'"):
        plugin.check_configuration(recipe_with(), {"distributed_type": "FSDP", "fsdp_config": "x"})


def test_a_divided_weight_is_gathered_and_set_whole():
    """On a mesh of one process: the same calls as with several."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        layer = torch.nn.Linear(3, 2, bias=False)
        value = torch.arange(6.0).reshape(2, 3)
        sharded = torch.distributed.tensor.distribute_tensor(value.clone(), mesh)
        layer.weight = torch.nn.Parameter(sharded)
        assert type(layer.weight.data).__name__ == "DTensor"
        (weight,) = adapter_weights(layer).values()
        assert type(weight) is torch.Tensor and torch.equal(weight, value)
        set_adapter_weights(layer, lambda name: value + 1)
        assert torch.equal(adapter_weights(layer)["weight"], value + 1)
    finally:
        torch.distributed.destroy_process_group()


def test_the_packaged_configuration_divides():
    settings = yaml.safe_load((packaged_folder("recipes") / "accelerate" / "fsdp.yaml").read_text())
    plugin.check_configuration(recipe_with(), settings)
    assert settings["distributed_type"] == "FSDP"
