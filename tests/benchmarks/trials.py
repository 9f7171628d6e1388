"""Adapters of several runs beside their base on validation films: what `dsc check` would say, by sample and together.

    python -m tests.benchmarks.trials RUN [RUN ...] [--samples 3] [--temperature 0.85 ...]

Choices of a recipe are made with this, never on test prompts. All adapters are served by one vLLM beside the base and asked
one after the other. The base and the prompts are those of the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsc_hub import stats
from dsc_hub.chain import hygiene, subject
from dsc_hub.chain.chain import seed_of
from dsc_hub.config.recipe import Recipe
from dsc_hub.evaluation import answers, claim
from dsc_hub.evaluation.summary import score_difference
from dsc_hub.inference import weights
from dsc_hub.inference.client import Completion, Generator
from dsc_hub.inference.servers import serve_model
from dsc_hub.metrics import loading
from dsc_hub.records import Answer, AnswerKey, Prompt
from dsc_hub.runs.lookup import find_run
from dsc_hub.runs.verdict import Setting
from dsc_hub.sampling.sample import fixed_level


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.85])
    parser.add_argument("--original", action="store_true", help="on the base's own weights, not as rounded for QLoRA")
    parser.add_argument("--show", type=int, default=0, help="so many distilled answers of each are printed")
    given = parser.parse_args()
    runs = {f"a{i}": find_run(name, Path("runs")) for i, name in enumerate(given.runs)}
    first = runs["a0"]
    recipe = first.facts.recipe
    prompts = [p for p in first.rows("prompts.jsonl").as_type(Prompt) if p.split == "validation"]
    identity = first.facts.identity
    scored = {name: s.score for name, s in loading.load_all(recipe, identity, Path()).items()}
    log = Path(tempfile.mkdtemp(prefix="trials-")) / "vllm.log"
    adapters = {name: run["adapter"] for name, run in runs.items()}
    base = first.facts.model.weights
    rounded = weights.evaluation_weights(base, identity["model"], recipe.distill)[0]
    folder = base if given.original else rounded
    with serve_model(folder, recipe.serving, log, adapters) as (endpoint,):
        for temperature in given.temperature:
            settings = recipe.generation.model_copy(update={"temperature": temperature})
            answered = asyncio.run(_answers(endpoint, settings, recipe, prompts, [None, *runs], given.samples))
            for name, run in runs.items():
                print(f"\n== {run.folder.name}  T {temperature}  {' '.join(run.facts.command.split()[2:])}", flush=True)
                _judge(answered, name, prompts, scored)
                for row in answered[name][0][: given.show]:
                    print(f"   [{row.prompt}] {' '.join(row.text.split())}")


async def _answers(
    endpoint: Any, settings: Any, recipe: Recipe, prompts: list[Prompt], arms: list[str | None], samples: int
) -> dict[str | None, list[list[Answer]]]:
    """Answers of each arm, by sample and prompt."""
    out: dict[str | None, list[list[Answer]]] = {}
    async with Generator([endpoint], settings, recipe.serving.request_timeout_s) as generator:
        for arm in arms:  # one after the other: on a CPU an adapter leaks into requests that share its batch
            wanted = [(k, p) for k in range(samples) for p in prompts]
            many = asyncio.Semaphore(fixed_level(recipe))

            async def one(k: int, p: Prompt, arm: str | None = arm, many: asyncio.Semaphore = many) -> Completion:
                async with many:
                    seed = seed_of(recipe.seed, p.id, k, 0, "answer")
                    return await generator.complete([{"role": "user", "content": p.text}], seed, arm)

            got = await asyncio.gather(*(one(k, p) for k, p in wanted))
            out[arm] = [[] for _ in range(samples)]
            for (k, p), c in zip(wanted, got, strict=True):
                out[arm][k].append(
                    Answer("", p.id, 0, p.group, p.text, c.text, c.finish_reason, c.new_tokens, c.prompt_tokens, "")
                )
    return out


def _judge(answered: Any, name: str, prompts: list[Prompt], scored: dict[str, Any]) -> None:
    totals: dict[str, list[str]] = {}
    pooled: dict[str, dict[AnswerKey, Answer]] = {"base": {}, "distilled": {}}
    for k, (base, distilled) in enumerate(zip(answered[None], answered[name], strict=True)):
        rows = [replace(r, arm="base") for r in base] + [replace(r, arm="distilled") for r in distilled]
        rows = answers.score_answers(rows, {p.id: p for p in prompts}, scored)
        by_arm = {arm: {(r.prompt_id, 0): r for r in rows if r.arm == arm} for arm in pooled}
        differences = {n: score_difference(by_arm["distilled"], by_arm["base"], n) for n in scored}
        for arm, of in by_arm.items():
            pooled[arm] |= {(i, k): r for (i, _), r in of.items()}
        scales = {n: {"name": n, "unit": "", "higher_is_better": True} for n in scored}
        for c in claim.assess(rows, prompts, Setting("validation"), differences, scales).criteria:
            value = "" if c.value is None else f" {c.value:.2f}"
            totals.setdefault(c.name, []).append(f"{c.verdict}{value} {c.note.split(';')[0]}".strip())
    for n in scored:
        d = score_difference(pooled["distilled"], pooled["base"], n)
        means = {arm: stats.estimate(*zip(*_scored(of, n), strict=True))["mean"] for arm, of in pooled.items()}
        print(f"  {n}: {means['base']:+.3f} -> {means['distilled']:+.3f}  ({d['low']:+.2f} to {d['high']:+.2f})")
    subjects = [subject.subject_of(p) for p in prompts]
    for arm in (None, name):
        repeats = [
            sum(hygiene.repeats_itself(r.text, s) for r, s in zip(k, subjects, strict=True)) for k in answered[arm]
        ]
        print(f"  {'base' if arm is None else 'distilled'}: repeats {repeats} of {len(prompts)}")
    for criterion, told in totals.items():
        if criterion != "on test prompts":
            print(f"  {criterion}:\n" + "\n".join(f"      {t}" for t in told))


def _scored(rows: dict[AnswerKey, Answer], name: str) -> list[tuple[float, str]]:
    return [(value, r.group) for r in rows.values() if (value := r.score(name)) is not None]


if __name__ == "__main__":
    main()
