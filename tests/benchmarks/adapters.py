"""How fast and how exact are the ways to serve an adapter on a CPU?

    python -m tests.benchmarks.adapters RUN [--rounds 5] [--in-flight 64] [--tokens 96] [--texts 40]
        [--dtype bfloat16|float32] [--ways ours vllm merged] [--json FILE]

RUN is a run folder with an adapter. The ways: `ours` (vllm_lora.py), `vllm` (vLLM's own operations), `merged` (base and
adapter added up in float32, served in --dtype). Speed: tokens a second of so many requests at once with so
many new tokens, base and adapter in turns on one server, and the ratio of each round. Exactness: log-probabilities of
the tokens of answers in the run, against the merged weights in float32 (transformers): mean |difference| in nats, and
how often both have the same most probable token. `base` is the same for the base without an adapter: what the dtype
alone does. `mixed`: the same for the base's rows of batches that hold requests to the adapter, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from dsc_hub.config.recipe import Recipe
from dsc_hub.inference import servers, weights
from dsc_hub.inference.vllm import BASE
from dsc_hub.runs.run import Run
from dsc_hub.system import machine

ADAPTER = "distilled"
WAYS = ("ours", "vllm", "merged")
NOT_OURS = ("--worker-extension-cls", "")  # the last one counts
PROMPT = "Write a review of a film. Number of the film: {n}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--texts", type=int, default=40)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=machine.cpu_dtype())
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numbers = asyncio.run(measure(options)) | {"hardware": machine.hardware(), "versions": machine.versions()}
    print(json.dumps(numbers, indent=2))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    run = Run(options.run)
    recipe = Recipe.model_validate(run.facts.recipe)
    base, _ = weights.evaluation_weights(run.facts.model.weights, run.facts.identity["model"], recipe.distill)
    adapter, out = run["adapter"], {}
    rows = [json.loads(line) for line in run["evaluation/turns.jsonl"].read_text().splitlines()]
    texts = [row["text"] for row in rows if row["new_tokens"] > 20][: options.texts]
    with tempfile.TemporaryDirectory(prefix="adapters-") as work:
        place = Path(work)
        merged = merge(base, adapter, place / "merged")
        exact = {"base": exact_logprobs(base, texts), ADAPTER: exact_logprobs(merged, texts)}
        for way in options.ways:
            beside = {ADAPTER: adapter} if way != "merged" else None
            more = ("--dtype", options.dtype, *(NOT_OURS if way == "vllm" else ()))
            section = recipe.serving.model_copy(update={"concurrency": options.in_flight})
            folder = merged if way == "merged" else base
            with servers.serve_model(folder, section, place / "vllm.log", beside, more=more) as (endpoint,):
                out[way] = await measure_way(endpoint, way, texts, exact, options)
            print(way, out[way], flush=True)
        with servers.serve_model(base, section, place / "vllm.log", more=("--dtype", options.dtype)) as (endpoint,):
            out["alone"] = {"base tokens/s": await speeds(endpoint, [BASE], options)}
    return out


async def measure_way(
    endpoint: servers.Endpoint, way: str, texts: Sequence[str], exact: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    if way == "merged":  # served under the name of the base
        adapted = await logprobs(endpoint, texts, [BASE])
        return {
            "tokens/s": await speeds(endpoint, [BASE], options),
            "adapter": differences(exact[ADAPTER], adapted) | effect(exact, adapted),
        }
    served = await speeds(endpoint, [BASE, ADAPTER], options)
    base, adapted = [await logprobs(endpoint, texts, [model], alone=way == "vllm") for model in (BASE, ADAPTER)]
    out = {
        "tokens/s": served,
        "adapter/base": statistics.median(a / b for a, b in zip(served[ADAPTER], served[BASE], strict=True)),
        "base": differences(exact["base"], base),
        "adapter": differences(exact[ADAPTER], adapted) | effect(exact, adapted),
    }
    if way == "ours":  # vLLM's own operations end the engine here
        mixed = await logprobs(endpoint, [text for text in texts for _ in (BASE, ADAPTER)], [BASE, ADAPTER])
        out["mixed"] = {
            "base": differences(exact["base"], mixed[::2]),
            "adapter": differences(exact[ADAPTER], mixed[1::2]),
        }
    return out


async def speeds(
    endpoint: servers.Endpoint, models: Sequence[str], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Return new tokens a second by model, round by round; the first round, which warms up, is left out."""
    out: dict[str, list[float]] = {model: [] for model in models}
    async with session(endpoint) as client:
        for n in range(options.rounds + 1):
            for model in models:
                bodies = [
                    {"messages": [{"role": "user", "content": PROMPT.format(n=i)}], "seed": i, "ignore_eos": True}
                    for i in range(options.in_flight)
                ]
                started = time.monotonic()
                replies = await asyncio.gather(
                    *(
                        post(client, endpoint, "chat/completions", b | {"model": model, "max_tokens": options.tokens})
                        for b in bodies
                    )
                )
                tokens = sum(reply["usage"]["completion_tokens"] for reply in replies)
                if n:
                    out[model].append(round(tokens / (time.monotonic() - started), 1))
    return out


Logprobs = list[dict[str, float | int]]  # by token of a text, from the second: nats, most probable token


async def logprobs(
    endpoint: servers.Endpoint, texts: Sequence[str], models: Sequence[str], alone: bool = False
) -> list[Logprobs]:
    """Return what the server says of each text's tokens; the models in turns, all requests at once or `alone`."""
    at_once = asyncio.Semaphore(1 if alone else len(texts))
    async with session(endpoint) as client:

        async def ask(i: int, text: str) -> Any:
            body = {"model": models[i % len(models)], "prompt": text, "max_tokens": 1, "prompt_logprobs": 1}
            async with at_once:
                return await post(client, endpoint, "completions", body)

        replies = await asyncio.gather(*(ask(i, text) for i, text in enumerate(texts)))
    out = []
    for reply in replies:
        tokens = [token for token in reply["choices"][0]["prompt_logprobs"] if token]
        # The token itself comes first, and the most probable one has rank 1.
        out.append(
            [
                {
                    "nats": next(iter(token.values()))["logprob"],
                    "top": int(next(key for key, value in token.items() if value["rank"] == 1)),
                }
                for token in tokens
            ]
        )
    return out


def session(endpoint: servers.Endpoint) -> aiohttp.ClientSession:
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    return aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=3600))


async def post(client: aiohttp.ClientSession, endpoint: servers.Endpoint, route: str, body: dict[str, Any]) -> Any:
    async with client.post(f"{endpoint.url}/{route}", json=body) as reply:
        reply.raise_for_status()
        return await reply.json()


def merge(base: Path, adapter: Path, target: Path) -> Path:
    """Write base and adapter as one model, added up in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).save_pretrained(target)
    weights.copy_matching(base, target, (*weights.TOKENIZER_FILES, "generation_config.json"))
    return target


def exact_logprobs(folder: Path, texts: Sequence[str]) -> list[Logprobs]:
    """Return the same in float32, without a server."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    out = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].log_softmax(-1)
        nats = scores.gather(1, ids[0, 1:, None])[:, 0]
        out.append([{"nats": float(n), "top": int(t)} for n, t in zip(nats, scores.argmax(-1), strict=True)])
    return out


def differences(exact: Sequence[Logprobs], served: Sequence[Logprobs]) -> dict[str, float]:
    pairs = [pair for a, b in zip(exact, served, strict=True) for pair in zip(a, b, strict=True)]
    return {
        "mean |difference| (nats)": round(statistics.fmean(abs(a["nats"] - b["nats"]) for a, b in pairs), 5),
        "same most probable token": round(statistics.fmean(a["top"] == b["top"] for a, b in pairs), 4),
        "tokens": len(pairs),
    }


def effect(exact: dict[str, list[Logprobs]], adapted: Sequence[Logprobs]) -> dict[str, float]:
    """Return how much of the adapter's effect on log-probabilities is served: the slope through the origin, and its
    standard error. Rounding that loses small changes of weights makes it smaller than 1."""
    nats = [[t["nats"] for text in side for t in text] for side in (exact["base"], exact[ADAPTER], adapted)]
    wanted = [b - a for a, b in zip(nats[0], nats[1], strict=True)]
    had = [b - a for a, b in zip(nats[0], nats[2], strict=True)]
    squares = sum(x * x for x in wanted)
    slope = sum(x * y for x, y in zip(wanted, had, strict=True)) / squares
    residual = statistics.fmean((y - slope * x) ** 2 for x, y in zip(wanted, had, strict=True))
    return {"slope": round(slope, 4), "standard error": round((residual / squares) ** 0.5, 4)}


if __name__ == "__main__":
    main()
