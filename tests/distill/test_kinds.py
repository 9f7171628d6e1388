"""Models and chat templates of the kinds that people have: each is measured, checked and trained, tiny and random."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)
from trl import SFTConfig, SFTTrainer

from dsc_hub.distill import launcher
from dsc_hub.distill import train as distill_train
from dsc_hub.distill.memory import GIB, TrainingSize, peak_bytes
from dsc_hub.distill.preflight import check_training
from dsc_hub.distill.rehearsal import size_of
from dsc_hub.distill.rows import training_rows
from dsc_hub.errors import DataError, ModelError
from dsc_hub.runs.run import Run
from tests.distill.tiny import QUICK, make_run, row
from tests.inference import chat_templates

ONE_STEP = QUICK | {"max_steps": 1, "per_device_train_batch_size": 2}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
KINDS: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "fused qkv": (Phi3Config, {}),
    "experts": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "thinking": (Qwen3Config, {"head_dim": 16}),
    "sliding windows": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 16}),
}


def model_of(kind: str, base: Path, folder: Path) -> Path:
    """Write a tiny random model of a kind, with the tokenizer of the packaged model."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    make, more = KINDS[kind]
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make(vocab_size=len(tokenizer), **SHAPE, **ids, **more))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "kind", ["experts", *(pytest.param(k, marks=pytest.mark.long) for k in KINDS if k != "experts")]
)
def test_each_kind_of_model_trains_and_its_size_is_known_before(tmp_path: Path, base: Path, kind: str):
    model = model_of(kind, base, tmp_path / "model")
    run = make_run(tmp_path / "run", model, sft=ONE_STEP)
    size = size_of(run.facts.recipe, model)
    summary = distill_train.train(run)
    assert (summary.total_parameters - summary.trainable_parameters, summary.trainable_parameters) == (
        size.parameters,
        size.trained,
    )
    assert f"{100 * size.quantised_share:.0f} % of the parameters" in summary.quantization
    # Experts in one tensor stay wide, and they are most of such a model.
    dense = size.parameters - SHAPE["hidden_size"] * size.vocabulary
    assert (size.quantised > 0.9 * dense) is (kind != "experts")


@pytest.mark.parametrize(
    "name",
    ["GEMMA", "QWEN3", *(pytest.param(n, marks=pytest.mark.long) for n in ("MISTRAL", "LLAMA3", "R1", "HARMONY"))],
)
def test_rows_are_trained_with_each_kind_of_template(tmp_path: Path, base: Path, name: str):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").write_text(getattr(chat_templates, name))
    run = make_run(tmp_path / "run", model, sft=ONE_STEP | {"max_steps": 2})
    trained = "".join(token.text for token in check_training(run).first_row if token.trained)
    assert row(0)["completion"][0]["content"] in trained and "Review film" not in trained
    assert distill_train.train(run).steps == 2
    ours = check_training(run).train
    theirs = tokenised_by_trl(run, model)
    assert ours["input_ids"] == theirs["input_ids"] and ours["labels"] == theirs["labels"] and len(ours) == 6


def tokenised_by_trl(run: Run, model: Path) -> datasets.Dataset:
    """The training rows as trl tokenises and masks them itself."""
    args = SFTConfig(output_dir=str(run.folder / "of trl"), use_cpu=True, bf16=False, max_length=None, report_to="none")
    rows = datasets.Dataset.from_list(training_rows(run, run.facts.recipe)["train"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model)
    return SFTTrainer(model=base, args=args, train_dataset=rows, processing_class=tokenizer).train_dataset


def test_a_template_without_system_turn_is_refused_before_training(tmp_path: Path, base: Path):
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").write_text(chat_templates.GEMMA)
    with pytest.raises(ModelError, match="System role not supported"):
        check_training(make_run(tmp_path / "run", model, system="Be brief."))


def test_a_template_that_would_train_the_prompt_is_refused_before_training(tmp_path: Path, base: Path):
    """The system text stands before the last turn if that is the user's, and nowhere once an answer follows."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / "chat_template.jinja").write_text(chat_templates.MISTRAL)
    with pytest.raises(DataError, match="its system text is not in the part that is not trained"):
        check_training(make_run(tmp_path / "run", model, system="Be brief."))


@pytest.mark.long
@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_the_estimated_memory_is_about_what_training_takes(tmp_path: Path, base: Path, method: str):
    """A model large enough for its activations and weights to count beside the libraries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    shape = SHAPE | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12}
    folder = tmp_path / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [row(n, "A warm and lovely film. " * 24) for n in range(8)]
    settings = ONE_STEP | {"per_device_train_batch_size": 8}
    run = make_run(tmp_path / "run", folder, rows, method=method, sft=settings)
    data = check_training(run)
    size = size_of(run.facts.recipe, folder)
    wide = 4 if distill_train.compute_dtype(on_cpu=True) == torch.float32 else 2
    estimate = peak_bytes(size, 8, data.longest, wide) / GIB
    peak = launcher.launch(run).peak_memory_gib
    assert 0.6 < estimate / peak < 1.6, (estimate, peak)


def test_recomputed_activations_and_quantised_weights_take_less():
    size = TrainingSize(
        parameters=8_000_000_000,
        quantised=7_000_000_000,
        bits=4,
        trained=40_000_000,
        layers=32,
        hidden=4096,
        inner=14336,
        vocabulary=128_000,
        recomputes=True,
    )
    recomputed = peak_bytes(size, 4, 1024, 2)
    assert 10 * GIB < recomputed < 20 * GIB  # an 8B model on one GPU of 24 GB
    assert peak_bytes(size.model_copy(update={"recomputes": False}), 4, 1024, 2) > 2 * recomputed
    assert peak_bytes(size.model_copy(update={"quantised": 0}), 4, 1024, 2) > recomputed + 9 * GIB
