"""The functions for Python: the same work as the command line's, with typed results, also inside a running event loop."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsc_hub
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.records import Chain, Prompt
from dsc_hub.system import event_loop
from tests.conftest import interrupt_once


@pytest.fixture
def in_a_home(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sampled(recipe_file: Path, server: str, *overrides: str) -> dsc_hub.Results:
    context = dsc_hub.resolve(recipe_file, [f"serving.endpoints=[{server}]", "publish.to=none", *overrides])
    return dsc_hub.run(context, until="dataset")


def test_stages_run_and_their_results_have_types(recipe_file: Path, server: str, in_a_home: Path):
    results = sampled(recipe_file, server)
    numbers = results.metrics
    assert numbers.sampling and numbers.dataset and numbers.evaluation is None
    chains, prompts = list(results.chains()), list(results.prompts())
    assert isinstance(chains[0], Chain) and isinstance(prompts[0], Prompt)
    assert numbers.sampling.finished == len(chains) == numbers.sampling.chains
    assert results.recipe.chain.steps == 2
    assert results.folder.is_relative_to("runs") and dsc_hub.load_run(results.recipe.name) == results
    assert sampled(recipe_file, server) == results  # nothing is done twice, and it is the same run


def test_it_works_where_an_event_loop_runs_already(recipe_file: Path, server: str, in_a_home: Path):
    async def cell() -> dsc_hub.Results:
        return sampled(recipe_file, server)

    assert asyncio.run(cell()).metrics.sampling is not None


def test_what_is_not_there_is_an_error_with_the_way_out(recipe_file: Path, server: str, in_a_home: Path):
    with pytest.raises(ConfigError, match="setps: unknown key"):
        dsc_hub.resolve(recipe_file, ["chain.setps=1"])
    results = sampled(recipe_file, server)
    with pytest.raises(RunError, match="no claim that was judged"):
        _ = results.claim
    with pytest.raises(RunError, match="is not evaluated"):
        list(results.answers())
    with pytest.raises(RunError, match="has no adapter"):
        _ = results.adapter
    with pytest.raises(ConfigError):
        dsc_hub.load_run("nosuch")
    facts = results.folder / "run.json"
    facts.write_text(facts.read_text().replace('"chains_per_prompt"', '"chains_a_prompt"'))
    with pytest.raises(RunError, match="can't read: .*chains_a_prompt"):
        _ = results.recipe
    metrics = results.folder / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"finished"', '"finnished"'))
    with pytest.raises(RunError, match="is damaged"):
        _ = results.metrics


def test_importing_it_is_light_and_names_what_it_offers():
    code = "import sys, dsc_hub; sys.exit(' '.join({'pydantic', 'numpy', 'openai', 'huggingface_hub'} & set(sys.modules)) or None)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert all(callable(getattr(dsc_hub, name)) for name in dsc_hub.__all__) and len(dsc_hub.__all__) < 10
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = dsc_hub.nosuch


async def _double(n: int) -> int:
    await asyncio.sleep(0)
    return 2 * n


def test_a_coroutine_runs_with_and_without_a_loop_around_it():
    async def outer() -> int:
        return event_loop.run_coroutine(_double(3))

    assert event_loop.run_coroutine(_double(2)) == 4 and asyncio.run(outer()) == 6


def test_an_interrupt_ends_the_coroutine_before_it_is_raised():
    ended, begun = [], []

    async def long() -> None:
        begun.append(True)
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt_once(lambda: bool(begun))
        with pytest.raises(KeyboardInterrupt):
            event_loop.run_coroutine(long())

    before, started = signal.getsignal(signal.SIGINT), time.monotonic()
    try:
        asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True] and time.monotonic() - started < 20
