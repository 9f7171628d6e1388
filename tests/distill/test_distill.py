"""Real trl, peft and bitsandbytes on a tiny random Llama with SmolLM2's tokenizer (where pad is eos)."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from trl import SFTTrainer

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.training import DistillConfig
from dsc_hub.distill import adapter_files, launcher, model, trainers
from dsc_hub.distill import train as distill_train
from dsc_hub.distill.config import check_section, plan_of
from dsc_hub.distill.preflight import check_training
from dsc_hub.errors import ConfigError, DataError, ModelError, RunError
from dsc_hub.runs.run import Run
from dsc_hub.system import machine
from dsc_hub.system.files import packaged_folder
from tests import fixture_run
from tests.distill.tiny import COMMIT, PUBLISHED, QUICK, make_run, pair, row

RECIPE = Recipe.model_validate(fixture_run.facts()["recipe"])


class Spy(SFTTrainer):
    """The real trainer; remembers its batches and what the parameters were before."""

    last: Spy

    def train(self, *args, **kwargs):
        Spy.last, self.batches = self, []
        self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.batches.append({k: v.clone() for k, v in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """One QLoRA training of 6 rows in batches of 4, two epochs, with 3 validation rows."""
    run = make_run(
        tmp_path_factory.mktemp("trained") / "run",
        base,
        validation=[row(n) for n in range(20, 23)],
        sft={**QUICK, "num_train_epochs": 2},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainers.TRAINERS, "sft", Spy)
        return run, distill_train.train(run), Spy.last


# -- what the training does


def test_only_lora_weights_change(trained):
    _, _, trainer = trained
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, trainer.before[n])}
    lora = {n for n in trainer.before if "lora_" in n}
    assert changed == lora and len(lora) == 2 * 7 * 2  # layers x linear modules x (A, B)


def test_the_linear_layers_lie_in_double_quantized_nf4(trained):
    _, summary, trainer = trained
    layers = [m for m in trainer.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(m.weight.quant_state.quant_type == "nf4" and m.weight.quant_state.nested for m in layers)
    assert summary.quantization == "nf4 with double quantization, 14 layers, 2 % of the parameters"


def test_prompts_are_masked_and_the_end_is_trained_in_every_real_batch(trained, base):
    _, _, trainer = trained
    tokenizer = AutoTokenizer.from_pretrained(base)
    seen = 0
    for batch in trainer.batches:
        for ids, labels, attention in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            seen += 1
            kept = labels != -100
            assert tokenizer.decode(ids[~kept & attention.bool()]).endswith("<|im_start|>assistant\n")
            answer = tokenizer.decode(ids[kept])
            assert answer.startswith("A warm") and answer.endswith("film.<|im_end|>\n") and "<|im_start|>" not in answer
            assert not kept[attention == 0].any()  # padding is the same token as the end, and is not trained
    assert seen == 12


def test_the_summary_counts_what_was_done(trained, base):
    run, summary, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [r["completion"][0]["content"] + "<|im_end|>\n" for r in (row(n) for n in range(6))]
    assert summary.trained_tokens_per_epoch == sum(
        len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts
    )
    assert (summary.rows, summary.validation_rows, summary.steps, summary.epochs) == (6, 3, 4, 2.0)
    log = [json.loads(line) for line in (run["adapter"] / "training_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and summary.first_loss == losses[0] and summary.final_loss == losses[-1] < losses[0]
    assert summary.validation_loss == pytest.approx(next(e["eval_loss"] for e in log if "eval_loss" in e))
    # r 16 on q, k, v, o, gate, up, down of two layers: 16 * (inputs + outputs)
    assert summary.trainable_parameters == 2 * 16 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)
    assert json.loads((run["adapter"] / "summary.json").read_text()) == summary.model_dump()


def test_the_adapter_folder_holds_what_others_need_and_nothing_of_this_machine(trained, base):
    run, _, _ = trained
    files = {p.name: p.read_bytes() for p in run["adapter"].rglob("*")}
    assert set(files) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training_log.jsonl",
        "summary.json",
    }
    for name, content in files.items():
        assert (
            str(run.folder).encode() not in content and str(base).encode() not in content and b"/tmp/" not in content
        ), name
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (PUBLISHED, COMMIT)
    assert not run["adapter.part"].exists()


def test_the_adapter_loads_onto_the_base_and_changes_what_it_says(trained, base):
    run, _, _ = trained
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run["adapter"])
    ids = torch.tensor(
        [tokenizer.apply_chat_template(row(1)["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]]
    )
    with torch.no_grad():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, run["adapter"])(ids).logits
    assert (before - after).abs().max() > 0.01


def test_the_same_seed_gives_the_same_bytes_and_without_validation_rows_there_is_no_validation_loss(tmp_path, base):
    runs = [make_run(tmp_path / name, base, validation=validation) for name, validation in (("a", None), ("b", []))]
    assert [distill_train.train(run).validation_loss for run in runs] == [None, None]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (runs[0]["adapter"] / name).read_bytes() == (runs[1]["adapter"] / name).read_bytes()


def test_method_lora_trains_without_quantization(tmp_path, base, monkeypatch):
    monkeypatch.setitem(trainers.TRAINERS, "sft", Spy)
    summary = distill_train.train(
        make_run(tmp_path / "run", base, method="lora", lora={"r": 4, "target_modules": ["q_proj"]})
    )
    assert (summary.method, summary.quantization) == ("lora", "none")
    assert not [m for m in Spy.last.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert summary.trainable_parameters == 2 * 4 * (64 + 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_is_trained_in_what_the_processor_computes_in(tmp_path, base, monkeypatch, dtype: str):
    monkeypatch.setitem(trainers.TRAINERS, "sft", Spy)
    monkeypatch.setattr(model.machine, "cpu_dtype", lambda: dtype)
    summary = distill_train.train(make_run(tmp_path / "run", base))
    assert summary.compute_dtype == dtype
    dtypes = {str(p.dtype) for p in Spy.last.model.parameters() if p.requires_grad}
    assert dtypes == {f"torch.{dtype}"}
    changed = [n for n, p in Spy.last.model.named_parameters() if not torch.equal(p, Spy.last.before[n])]
    assert changed and all("lora_" in n for n in changed)


# -- what is refused


def test_all_wrong_keys_are_named_at_once_with_what_was_meant(tmp_path, base):
    run = make_run(
        tmp_path / "run",
        base,
        sft={"learing_rate": 1e-4, "num_train_epochs": "many", "trust_remote_code": True},
        lora={"rank": 8, "lora_alfa": 16},
        quantization={"bnb_4bit_quant_typ": "nf4"},
    )
    with pytest.raises(ConfigError) as error:
        check_training(run)
    problems = "\n".join(error.value.problems)
    assert len(error.value.problems) == 6
    assert "distill.sft.learing_rate: unknown key; did you mean 'learning_rate'?" in problems
    assert (
        "distill.sft.num_train_epochs: should be a valid number, unable to parse string as a number, got 'many'"
        in problems
    )
    assert "distill.lora.lora_alfa: unknown key; did you mean 'lora_alpha'?" in problems
    assert "distill.quantization.bnb_4bit_quant_typ: unknown key; did you mean 'bnb_4bit_quant_type'?" in problems


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"quantization": {"bnb_4bit_quant_type": "zzz"}}, "bnb_4bit_quant_type: expected nf4 or fp4, got 'zzz'"),
        ({"quantization": {"bnb_4bit_compute_dtype": "zzz"}}, "distill.quantization: .* no attribute 'zzz'"),
        ({"sft": {"max_steps": True}}, "distill.sft.max_steps: should be a number, got true"),
        ({"lora": {"lora_dropout": False}}, "distill.lora.lora_dropout: should be a number, got false"),
    ],
)
def test_values_that_would_fail_in_training_or_mean_another_thing_are_told_by_the_plan(section, told):
    with pytest.raises(ConfigError) as error:
        check_section(DistillConfig(**section))
    (problem,) = error.value.problems
    assert re.search(told, problem)


def test_a_section_that_was_found_right_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    ran = []

    def child(command: list[str], input: str, **_: object) -> subprocess.CompletedProcess[str]:
        """What the check of settings prints, which takes a quarter of a minute: nothing, or an error."""
        ran.append(1)
        told = launcher.shown_error(ConfigError("no", problems=["max_steps"])) if "max_steps" in input else ""
        return subprocess.CompletedProcess(command, 0, told, "")

    monkeypatch.setattr(launcher.subprocess, "run", child)
    good, wrong = DistillConfig(), DistillConfig(sft={"max_steps": True})
    assert launcher.check_in_child(good) == launcher.check_in_child(good) == [] and len(ran) == 1
    assert launcher.check_in_child(wrong) == launcher.check_in_child(wrong) != [] and len(ran) == 3
    monkeypatch.setattr(launcher.machine, "versions", lambda: {"trl": "9"})
    assert launcher.check_in_child(good) == [] and len(ran) == 4


def test_a_number_that_yaml_reads_as_text_is_a_number():
    plan = plan_of(DistillConfig(sft={"learning_rate": "2e-4"}))
    assert plan.settings["learning_rate"] == 0.0002


@pytest.mark.parametrize(
    "lora",
    [
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"bias": "all"},
        {"target_modules": ["embed_tokens"]},
        {"r": 0},
    ],
)
def test_what_could_not_be_served_as_a_plain_adapter_is_refused(tmp_path, base, lora):
    with pytest.raises(ConfigError, match=f"distill.lora.{next(iter(lora))}"):
        check_training(make_run(tmp_path / "run", base, lora=lora))


def test_unknown_target_modules_are_a_config_error(tmp_path, base):
    with pytest.raises(ConfigError, match="target_modules"):
        distill_train.train(make_run(tmp_path / "run", base, lora={"target_modules": ["query"]}))


def test_test_rows_are_refused(tmp_path, base):
    run = make_run(tmp_path / "file", base)
    (run["dataset"] / "sft" / "test-00000-of-00001.parquet").touch()
    with pytest.raises(DataError, match="test rows"):
        check_training(run)
    with pytest.raises(DataError, match="test rows"):
        check_training(
            make_run(tmp_path / "column", base, rows=[row(0) | {"split": "train"}, row(1) | {"split": "test"}])
        )


OPENED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


def test_nothing_but_the_recipe_and_the_training_rows_is_read(tmp_path, base, monkeypatch):
    run = make_run(tmp_path / "run", base, validation=[row(9)])
    others = [
        run["prompts.jsonl"],
        run["chains.jsonl"],
        run["dataset"] / "evaluation" / "test-00000-of-00001.parquet",
        run["evaluation"] / "rows.jsonl",
    ]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
    sys.addaudithook(_note)  # sees what Python opens; inotify, below, sees what C++ opens too
    libc = ctypes.CDLL(None)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and all(libc.inotify_add_watch(watch, str(p).encode(), 0x20) >= 0 for p in others)  # IN_OPEN
    monkeypatch.setitem(globals(), "OPENED", [])
    distill_train.train(run)
    opened = {
        Path(p).relative_to(run.folder).as_posix()
        for p in OPENED
        if p.startswith(f"{run.folder}/") and "adapter" not in p and "checkpoints" not in p
    }
    assert opened == {
        "run.json",
        "distill.lock",
        "dataset/sft/train-00000-of-00001.parquet",
        "dataset/sft/validation-00000-of-00001.parquet",
    }
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    others[0].read_text()
    assert os.read(watch, 4096)  # the watch works
    os.close(watch)


def test_rows_that_do_not_fit_are_counted_and_refused(tmp_path, base):
    rows = [row(0), row(1), row(3, "long " * 300), row(4, "long " * 200)]
    with pytest.raises(DataError, match="2 of 4 rows are longer than serving.context = 128 tokens"):
        check_training(make_run(tmp_path / "context", base, rows=rows, context=128))
    with pytest.raises(DataError, match=r"2 of 4 rows are longer than distill.sft.max_length = 100 tokens"):
        check_training(make_run(tmp_path / "length", base, rows=rows, sft={"max_length": 100}))
    # longer than trl's silent 1024, and not cut
    checked = check_training(make_run(tmp_path / "long", base, rows=[row(0), row(2, "long " * 500)]))
    assert checked.max_length == checked.longest > 1500


def test_dropping_the_last_batch_of_too_few_rows_is_refused(tmp_path, base):
    sft = {**QUICK, "dataloader_drop_last": True}
    with pytest.raises(DataError, match="6 training rows are fewer than the 8 of a batch"):
        check_training(make_run(tmp_path / "few", base, sft=sft, processes=2))
    assert check_training(make_run(tmp_path / "enough", base, sft=sft)).rows == 6


def test_preflight_shows_which_tokens_are_trained(tmp_path, base):
    checked = check_training(make_run(tmp_path / "run", base, rows=[row(0)], system="Be kind."))
    trained = [t.text for t in checked.first_row if t.trained]
    masked = "".join(t.text for t in checked.first_row if not t.trained)
    assert (
        masked == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
        "Review film number 0.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "".join(trained) == "A warm and lovely film.<|im_end|>\n"
    assert checked.trained_tokens_per_epoch == len(trained) and checked.stop_tokens == ["<|im_end|>"]


def test_a_system_text_other_than_the_recipes_is_refused(tmp_path, base):
    other = row(0)
    other["prompt"].insert(0, {"role": "system", "content": "Be rude."})
    with pytest.raises(DataError, match="chain.system"):
        check_training(make_run(tmp_path / "run", base, rows=[other], system="Be kind."))


def with_template(base: Path, folder: Path, template: str | None) -> Path:
    """The tokenizer of `base` with another chat template (enough of a model for a preflight)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_a_template_without_an_end_of_turn_is_refused(tmp_path, base):
    model = with_template(
        base,
        tmp_path / "m",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    )
    with pytest.raises(DataError, match="does not end with a token that ends the turn"):
        check_training(make_run(tmp_path / "run", model))


def test_a_template_that_renders_no_answer_is_refused(tmp_path, base):
    model = with_template(
        base, tmp_path / "m", "{% for m in messages if m.role == 'user' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(DataError, match="nothing would be trained"):
        check_training(make_run(tmp_path / "run", model))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path, base):
    with pytest.raises(ModelError, match="no chat template"):
        check_training(make_run(tmp_path / "run", with_template(base, tmp_path / "m", None)))


def test_a_collator_that_hides_the_end_with_the_padding_is_caught(tmp_path, base, monkeypatch):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Collator

    collate = Collator.torch_call

    def masks_padding_by_its_id(self, examples):
        batch = collate(self, examples)
        batch["labels"][batch["input_ids"] == self.pad_token_id] = -100
        return batch

    monkeypatch.setattr(Collator, "torch_call", masks_padding_by_its_id)
    with pytest.raises(ModelError, match="the end of an answer is not trained"):
        distill_train.train(make_run(tmp_path / "run", base))


# -- when it breaks


def test_a_training_that_dies_leaves_no_adapter(tmp_path, base, monkeypatch):
    class Dies(Spy):
        def training_step(self, *args, **kwargs):
            if self.batches:
                raise RuntimeError("cosmic ray")
            return super().training_step(*args, **kwargs)

    run = make_run(tmp_path / "run", base)
    monkeypatch.setitem(trainers.TRAINERS, "sft", Dies)
    with pytest.raises(RuntimeError, match="cosmic ray"):
        distill_train.train(run)
    assert not run["adapter"].exists() and not run["adapter.part"].exists()


def test_a_half_written_adapter_never_passes_for_one(tmp_path, base, monkeypatch):
    run = make_run(tmp_path / "run", base)
    real = adapter_files.write_json

    def full_disk(path, value):
        if path.name == "summary.json":
            assert (path.parent / "adapter_model.safetensors").is_file() and not run["adapter"].exists()
            raise OSError(28, "No space left on device", str(path))
        real(path, value)

    monkeypatch.setattr(adapter_files, "write_json", full_disk)
    with pytest.raises(RunError, match="no space left"):
        distill_train.train(run)
    assert not run["adapter"].exists() and not run["adapter.part"].exists()


def test_a_loss_that_is_no_number_ends_the_training(tmp_path, base, monkeypatch):
    class Broken(Spy):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs) * float("nan")

    monkeypatch.setitem(trainers.TRAINERS, "sft", Broken)
    with pytest.raises(RunError, match="the loss is nan at step 1"):
        distill_train.train(make_run(tmp_path / "run", base))


# -- settings of the chat template

# As a template of the Qwen3 kind: thinking is switched by a setting, and shows in the prompt.
THINKS_UNLESS_TOLD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role == 'user' %} {{ '/think' if enable_thinking | default(true) else '/no_think' }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_rows_are_trained_with_the_settings_of_the_template_that_the_server_got(tmp_path, base, objective: str):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").write_text(THINKS_UNLESS_TOLD)
    rows = [row(n) if objective == "sft" else pair(n) for n in range(4)]
    config = "sft" if objective == "sft" else "preference"
    settings = {"max_steps": 1, "per_device_train_batch_size": 2}
    run = make_run(tmp_path / "run", model, rows, config=config, objective=objective, **{objective: settings})
    seen = {}
    for name, extra in (("default", {}), ("off", {"chat_template_kwargs": {"enable_thinking": False}})):
        facts = run.raw_facts
        facts["recipe"]["generation"]["extra"] = extra
        run.add_facts(recipe=facts["recipe"])
        data = check_training(run)
        seen[name] = "".join(token.text for token in data.first_row)
        distill_train.train(run)  # whose own batches are compared with the preflight's
    assert "/think" in seen["default"] and "/no_think" not in seen["default"] and "/no_think" in seen["off"]


# -- in processes of its own


def test_launch_trains_from_a_parent_without_torch_and_ignores_a_stale_launcher(tmp_path, base):
    run = make_run(tmp_path / "run", base, sft={**QUICK, "max_steps": 1})
    code = (
        "import json, sys; from pathlib import Path\n"
        "from dsc_hub.distill.launcher import launch; from dsc_hub.runs.run import Run\n"
        "summary = launch(Run(Path(sys.argv[1])))\n"
        "print(json.dumps({'summary': summary.model_dump(), 'torch': 'torch' in sys.modules}))"
    )
    stale = {
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "nowhere.invalid",
        "MASTER_PORT": "1",
        "ACCELERATE_USE_FSDP": "true",
    }
    child = subprocess.run(
        [sys.executable, "-c", code, str(run.folder)],
        env=os.environ | stale,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    said = json.loads(child.stdout)
    assert said["torch"] is False and said["summary"] == json.loads((run["adapter"] / "summary.json").read_text())
    assert (said["summary"]["steps"], said["summary"]["world_size"]) == (1, 1)
    assert "distill  sft, 6 rows, 0 for validation" in child.stderr
    noise = [line for line in child.stderr.splitlines() if not line.startswith("distill  ")]
    assert noise == []
    assert "distill  step 1/1" in run[launcher.LOG].read_text()


def test_a_mendable_error_of_the_child_is_the_same_error_in_the_parent(tmp_path, base, monkeypatch):
    run = make_run(tmp_path / "run", base, lora={"rank": 8})
    code = "import sys; from dsc_hub.distill import train; sys.exit(train.main(sys.argv[1:]))"
    monkeypatch.setattr(launcher, "_command", lambda run, *_: [sys.executable, "-c", code, str(run.folder)])
    with pytest.raises(ConfigError) as error:
        launcher.launch(run)
    assert error.value.problems == ("distill.lora.rank: unknown key; did you mean 'r'?",)


def test_a_crash_of_the_child_is_told_with_its_last_lines_and_the_log(tmp_path, base, monkeypatch):
    run = make_run(tmp_path / "run", base)
    monkeypatch.setattr(
        launcher,
        "_command",
        lambda *_: [sys.executable, "-c", "print('all well'); raise SystemExit('the GPU fell off')"],
    )
    with pytest.raises(RunError, match=r"(?s)exit code 1.*the GPU fell off.*distill\.log"):
        launcher.launch(run)
    assert "all well" in run[launcher.LOG].read_text()


def test_the_child_says_one_line_and_exits_with_2(tmp_path, base, capsys):
    run = make_run(tmp_path / "run", base, lora={"r": 0})
    assert distill_train.main([str(run.folder)]) == 2
    assert (
        capsys.readouterr().err == "ConfigError: distill has 1 problem\n  distill.lora.r: must be at least 1, got 0\n"
    )


@pytest.mark.parametrize(
    ("gpus", "visible", "processes", "expected"),
    [
        (0, None, 1, "one_cpu.yaml"),
        (2, None, 1, "one_gpu.yaml"),
        (2, "", 1, "one_cpu.yaml"),
        (2, None, 2, "multi_gpu.yaml"),
        (0, None, 2, "torch.distributed.run"),
    ],
)
def test_the_launcher_fits_the_machine(tmp_path, monkeypatch, gpus, visible, processes, expected):
    monkeypatch.setattr(launcher.machine, "gpus", lambda: ("H",) * gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    section = DistillConfig(processes=processes)
    assert any(part.endswith(expected) for part in launcher._command(Run(tmp_path), section))


def test_more_processes_than_gpus_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher.machine, "gpus", lambda: ("H",) * 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match="distill.processes is 4, and 2 GPUs are visible"):
        launcher._command(Run(tmp_path), DistillConfig(processes=4))


def test_the_packaged_accelerate_configurations_are_valid():
    files = sorted((packaged_folder("recipes") / "accelerate").glob("*.yaml"))
    configurations = {f.stem: load_config_from_file(str(f)) for f in files}
    assert {"one_cpu", "two_cpu", "one_gpu", "multi_gpu", "multi_node", "fsdp"} == set(configurations)
    assert configurations["one_cpu"].use_cpu and not configurations["one_gpu"].use_cpu
    assert configurations["multi_gpu"].distributed_type == "MULTI_GPU"
    assert configurations["fsdp"].fsdp_config["fsdp_version"] == 2
    assert configurations["multi_node"].num_machines == 2 and configurations["multi_node"].main_process_port
    assert all("accelerate launch --config_file recipes/accelerate/" + f.name in f.read_text() for f in files)


def test_a_configuration_is_named_or_a_file_and_brings_the_number_of_processes(tmp_path):
    assert launcher.processes_of("multi_gpu", RECIPE) == 2 and launcher.processes_of("one_gpu", RECIPE) == 1
    (tmp_path / "mine.yaml").write_text("num_processes: 3\n")
    assert launcher.processes_of(str(tmp_path / "mine.yaml"), RECIPE) == 3
    command = launcher._command(Run(tmp_path), DistillConfig(launch=str(tmp_path / "mine.yaml"), processes=3))
    assert command[command.index("--config_file") + 1] == str(tmp_path / "mine.yaml")
    assert command[command.index("--main_process_port") + 1] == "0"  # two trainings on a machine don't meet
    # accelerate itself would start one process of these two
    assert "torch.distributed.run" in launcher._command(Run(tmp_path), DistillConfig(launch="two_cpu", processes=2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "configuration .* not found"),
        ("[1, 2]", "no configuration of accelerate"),
        ("num_processes: many", "no configuration of accelerate"),
        ("num_processes: 16\nnum_machines: 2", "for 2 machines"),
    ],
)
def test_a_file_that_can_not_start_a_training_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        launcher.processes_of(str(tmp_path / "mine.yaml"), RECIPE)


@pytest.mark.parametrize(("name", "value"), [("CHECKED_WITHIN_S", 3), ("CHECKED_IN_BYTES", 3 << 30)])
def test_a_setting_that_is_read_without_end_is_an_error_and_not_a_hang(
    name: str, value: int, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path))
    monkeypatch.setattr(launcher, name, value)
    section = DistillConfig(sft={"accelerator_config": "/dev/zero"})
    with pytest.raises(ConfigError, match="did not come to an end within"):
        launcher.check_in_child(section)


# -- memory and dtypes of a GPU, as far as they show without one


@pytest.mark.parametrize(
    ("objective", "fits", "rows", "accumulated"),
    [
        ("sft", 3, 2, 4),
        ("kto", 2, 2, 4),
        *(pytest.param("sft", *n, marks=pytest.mark.long) for n in ((1, 1, 8), (4, 4, 2))),
    ],
)
def test_out_of_memory_halves_the_rows_at_once_and_keeps_those_of_a_step(
    tmp_path, base, monkeypatch, capsys, objective: str, fits: int, rows: int, accumulated: int
):
    class Small(trainers.TRAINERS[objective]):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > fits:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            Small.args_used = self.args
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setitem(trainers.TRAINERS, objective, Small)
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    data = [row(n) for n in range(16)] if objective == "sft" else [pair(n) for n in range(16)]
    config = "sft" if objective == "sft" else "preference"
    run = make_run(tmp_path / "run", base, rows=data, config=config, objective=objective, **{objective: settings})
    assert distill_train.train(run).steps == 2
    used = Small.args_used
    assert (used.per_device_train_batch_size, used.gradient_accumulation_steps) == (rows, accumulated)
    assert ("ran out of memory" in capsys.readouterr().err) == (fits < 4)


def test_out_of_memory_with_a_single_row_is_an_error(tmp_path, base, monkeypatch):
    class Full(Spy):
        def training_step(self, *args, **kwargs):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(trainers.TRAINERS, "sft", Full)
    with pytest.raises(RunError, match="out of memory in training with 1 rows at once"):
        distill_train.train(make_run(tmp_path / "run", base))


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch):
    """Turing and Volta: torch counts emulated bfloat16 as supported unless told otherwise."""
    emulated = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulated)
    assert model.compute_dtype(on_cpu=False) is torch.float32


def test_a_training_on_the_cpu_keeps_its_memory_and_loads_the_faster_openmp(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_PRELOAD", "libmine.so")
    monkeypatch.setattr(machine, "openmp_library", lambda: Path("/lib/libiomp5.so"))
    environment = launcher._child_environment(1, on_cpu=True)
    assert environment["LD_PRELOAD"] == "/lib/libiomp5.so:libmine.so" and environment["KMP_BLOCKTIME"] == "1"
    monkeypatch.setattr(machine, "openmp_library", lambda: None)  # as with the GPU lock
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")  # the user's own
    without = launcher._child_environment(1, on_cpu=True)
    assert without["LD_PRELOAD"] == "libmine.so" and without["MALLOC_MMAP_MAX_"] == "65536"
    monkeypatch.delenv("MALLOC_MMAP_MAX_")
    on_gpu = launcher._child_environment(1, on_cpu=False)
    assert on_gpu["LD_PRELOAD"] == "libmine.so" and "MALLOC_MMAP_MAX_" not in on_gpu


@pytest.mark.parametrize(("launch", "gpus", "on_cpu"), [(None, 0, True), (None, 1, False), ("one_cpu", 1, True)])
def test_where_a_training_runs_decides_its_environment(
    monkeypatch: pytest.MonkeyPatch, launch: str | None, gpus: int, on_cpu: bool
):
    monkeypatch.setattr(machine, "visible_gpus", lambda: ("0",) * gpus)
    assert launcher.is_on_cpu(DistillConfig(launch=launch)) == on_cpu


def printed(code: str, environment: dict[str, str]) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


needs_openmp = pytest.mark.skipif(machine.openmp_library() is None, reason="Intel's OpenMP comes with the CPU lock")


@needs_openmp
def test_what_the_environment_of_a_training_sets_is_in_effect_there():
    """A large block comes out of the heap, and not from the kernel, in a process with this environment."""
    code = (
        "import torch\n"
        "maps = open('/proc/self/maps').read()\n"
        "block = torch.empty(64 << 20, dtype=torch.uint8)\n"
        "heap = next(l for l in open('/proc/self/maps') if '[heap]' in l).split()[0].split('-')\n"
        "print('libiomp5.so' in maps, int(heap[0], 16) <= block.data_ptr() < int(heap[1], 16))"
    )
    assert printed(code, launcher._child_environment(1, on_cpu=True)) == ["True", "True"]
    assert printed(code, launcher._child_environment(1, on_cpu=False)) == ["False", "False"]


@needs_openmp
@pytest.mark.skipif(os.cpu_count() == 1, reason="of one core nothing can be taken away")
def test_a_training_is_not_bound_to_one_core_by_what_accelerate_sets():
    code = (
        "import os\n"
        "os.sched_setaffinity(0, range(os.cpu_count()))\n"  # whatever this test process has
        "before = len(os.sched_getaffinity(0))\n{}\nimport torch\n"
        "x = torch.ones(2000, 2000)\n(x @ x).sum()\n"
        "print(before > 1, len(os.sched_getaffinity(0)) == before)"
    )
    environment = launcher._child_environment(1, on_cpu=True)
    environment |= {"KMP_AFFINITY": "granularity=fine,compact,1,0", "OMP_NUM_THREADS": "2"}
    assert printed(code.format(""), environment) == ["True", "False"]
    assert printed(code.format("from dsc_hub.distill import train"), environment) == ["True", "True"]
