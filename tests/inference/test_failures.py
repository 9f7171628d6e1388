"""What can go wrong with servers, for real over HTTP: every request ends as a turn or in failed.jsonl with its reason."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.errors import MetricError, ServingError
from dsc_hub.inference import external, retries, server_pool, servers, vllm, vllm_process
from dsc_hub.inference.client import Generator
from dsc_hub.inference.servers import Endpoint
from dsc_hub.pipeline import resolve
from dsc_hub.pipeline.run import run_all
from dsc_hub.sampling import sample as sampling_sample
from tests.conftest import ROOT, end_of, length_score
from tests.sampling.test_sample import setup, sorted_rows
from tests.scripted_server import FAULTS

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT_S", 0.01)
    monkeypatch.setattr(retries, "LONGEST_S", 1.0)
    monkeypatch.setattr(server_pool, "PROBES", 4)


def sampled(
    recipe_file: Path,
    folder: Path,
    ends: list[Endpoint],
    *overrides: str,
    timeout_s: float = 20,
    level: Callable[[], int] | None = None,
) -> Any:
    """Sample with real clients; the run, the prompts, the tally, the generator."""
    run, r, some = setup(recipe_file, folder, *overrides)
    generator = Generator(ends, GenerationConfig(), timeout_s)

    async def go() -> Any:
        async with generator:
            return await sampling_sample.sample(
                run, r, some, generator.complete, length_score, level=level or generator.level
            )

    return run, some, asyncio.run(go()), generator


def once_begun(folder: Path, act: Callable[[], Any]) -> None:
    """Do something as soon as some turns of the run are on disk, however slow the machine is."""
    turns = folder / "turns.jsonl"

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (turns.is_file() and turns.read_bytes().count(b"\n") >= 3):
            time.sleep(0.005)
        act()

    threading.Thread(target=wait, daemon=True).start()


def whole(recipe_file: Path, folder: Path, start: Callable[..., Any]) -> Any:
    return sampled(recipe_file, folder, [end_of(start())])[0]


REASONS = {"closes": "connection lost", "hangs": "no answer in time", "no text": "garbage", "half": "connection lost"}


@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_that_passes_costs_a_retry_and_changes_nothing(
    recipe_file: Path, tmp_path: Path, start: Callable[..., Any], how: str
):
    # Of each request the first try goes wrong, for a hang (which takes its time) that of the answers alone.
    server = start(
        fault=lambda body, before: how if not before and (how != "hangs" or len(body["messages"]) == 1) else ""
    )
    timeout_s = 0.7 if how == "hangs" else 20  # short only where it is waited for: a busy machine answers late, too
    run, some, tally, generator = sampled(recipe_file, tmp_path / "run", [end_of(server)], timeout_s=timeout_s)
    assert (tally.finished, tally.failed) == (len(some), 0)
    assert set(generator.retries) == {REASONS.get(how, how)}
    retries = generator.retries.total()
    assert retries >= len(some) if how == "hangs" else retries == len(some) * 5
    for name in ("turns.jsonl", "chains.jsonl"):
        assert sorted_rows(run[name]) == sorted_rows(whole(recipe_file, tmp_path / "whole", start)[name])


@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_that_stays_costs_its_chain_and_is_told(
    recipe_file: Path, tmp_path: Path, start: Callable[..., Any], how: str
):
    hurt = "Film number 3"
    server = start(fault=lambda body, before: how if hurt in body["messages"][0]["content"] else "")
    run, some, tally, _ = sampled(
        recipe_file,
        tmp_path / "run",
        [end_of(server)],
        "prompts.split={train: 0.9, validation: 0.05, test: 0.05}",
        timeout_s=0.3 if how == "hangs" else 20,
    )
    affected = {p.id for p in some if hurt in p.text}
    assert affected and tally.failed == len(affected) and tally.finished + tally.failed == len(some)
    failed = list(run.rows("failed.jsonl"))
    assert {row["prompt_id"] for row in failed} == affected
    tries = {"hangs": 3, "429": 11, "503": 11}.get(how, 6)
    assert all(row["reason"].endswith(f"{tries} times") and "127.0.0.1" in row["reason"] for row in failed)


def test_retry_failed_takes_up_just_what_failed(
    recipe_file: Path, tmp_path: Path, home: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    broken, asked = [True], []
    server = start(
        fault=lambda body, before: "400" if broken and "Describe" in body["messages"][0]["content"] else "",
        bodies=asked,
    )
    address = f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]"

    def sample(retry_failed: bool = False) -> tuple[int, int]:
        context = resolve.resolve_recipe(str(recipe_file), [address], tmp_path / "runs")
        run_all(context, "sampling", retry_failed)
        result = context.run.marker("sampling")["result"]
        return result["finished"], result["failed"]

    assert sample() == (7, 7)
    (run,) = (tmp_path / "runs" / "little").iterdir()
    failed = [json.loads(line) for line in (run / "failed.jsonl").read_text().splitlines()]
    assert len(failed) == 7 and all("answered 400" in row["reason"] for row in failed)
    before = len(asked)
    assert sample() == (7, 7) and len(asked) == before  # done before: nothing is asked
    broken.clear()
    assert sample(retry_failed=True) == (14, 0) and not (run / "failed.jsonl").exists()
    assert all("Describe" in body["messages"][0]["content"] for body in asked[before:]) and len(asked) == before + 7 * 5


def test_the_level_stays_where_refusals_have_nothing_to_do_with_the_load(start: Callable[..., Any]):
    server = start(fault=lambda body, before: "429" if not before and body["seed"] % 5 == 0 else "")

    async def go() -> tuple[int, int]:
        async with Generator([end_of(server)], GenerationConfig(), 20, concurrency=100) as g:
            before = g.level()
            await asyncio.gather(*(g.complete([{"role": "user", "content": str(i)}], i) for i in range(300)))
            return before, g.level()

    assert asyncio.run(go()) == (100, 100)


# -- servers that go away


@pytest.fixture
def process() -> Iterator[Callable[..., Any]]:
    """Start a server as a process, which dies with its connections; (process, endpoint)."""
    children = []

    def make(port: int = 0) -> Any:
        command = [sys.executable, "-m", "tests.scripted_server", "--pause", "0.02", "--port", str(port)]
        children.append(child := subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        url = child.stdout.readline().strip()
        return child, external.external(ServingConfig(endpoints=(url,)))[0]

    yield make
    for child in children:
        child.kill()
        child.wait()


def test_the_requests_of_a_server_that_is_gone_go_to_the_others(
    recipe_file: Path, tmp_path: Path, process: Callable[..., Any], capfd: pytest.CaptureFixture[str]
):
    (one, first), (_, second) = process(), process()
    once_begun(tmp_path / "run", one.kill)
    run, some, tally, generator = sampled(recipe_file, tmp_path / "run", [first, second], "chain.chains_per_prompt=3")
    assert (tally.finished, tally.failed) == (len(some) * 3, 0) and generator.retries["server gone"] > 0
    assert "its requests go to the others" in capfd.readouterr().err
    keys = Counter((row["prompt_id"], row["chain"], row["step"], row["role"]) for row in run.rows("turns.jsonl"))
    assert set(keys.values()) == {1} and len(keys) == len(some) * 15


def test_a_server_that_comes_back_is_used_again(
    recipe_file: Path,
    tmp_path: Path,
    process: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(retries, "WAIT_S", 0.1)
    child, end = process()

    def away() -> None:
        child.kill()
        child.wait()
        process(int(end.url.split(":")[2].split("/")[0]))

    once_begun(tmp_path / "run", away)
    _, some, tally, generator = sampled(recipe_file, tmp_path / "run", [end])
    assert (tally.finished, tally.failed) == (len(some), 0) and generator.retries["server back"] == 1
    assert f"{end.url} is back" in capfd.readouterr().err


def test_when_none_comes_back_the_run_stops_with_what_is_done(
    recipe_file: Path, tmp_path: Path, process: Callable[..., Any], start: Callable[..., Any]
):
    child, end = process()
    once_begun(tmp_path / "run", child.kill)
    with pytest.raises(ServingError, match="did not come back in 4 tries.*\n.*run the same command again"):
        sampled(recipe_file, tmp_path / "run", [end], "serving.concurrency=2", level=lambda: 2)
    done = sorted_rows(tmp_path / "run" / "turns.jsonl")
    assert done and not (tmp_path / "run" / "failed.jsonl").exists()
    assert set(done) < set(sorted_rows(whole(recipe_file, tmp_path / "whole", start)["turns.jsonl"]))


# -- replicas of our own, with a scripted server in vLLM's place


@pytest.fixture
def scripted_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(
        folder: Path,
        section: ServingConfig,
        port: int,
        adapters: Any,
        on_cpu: bool,
        compiled: bool,
        more: Any,
    ) -> list[str]:
        return [
            sys.executable,
            "-m",
            "tests.scripted_server",
            "--port",
            str(port),
            "--model",
            vllm.BASE,
            "--pause",
            "0.02",
        ]

    monkeypatch.setattr(vllm, "vllm_command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def pids_of(url: str) -> list[int]:
    """Processes that serve at this address."""
    port = url.split(":")[2].split("/", maxsplit=1)[0]
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if (
            b"tests.scripted_server" in command
            and port.encode() in command
            and b"dsc_hub.system.supervisor" not in command
        ):
            found.append(int(folder.name))
    return found


def test_what_needs_no_server_is_done_while_one_starts_and_its_error_ends_it(
    tmp_path: Path, scripted_vllm: None, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    started: list[vllm.VllmServer] = []

    def noted(name: str) -> None:
        do = getattr(vllm.VllmServer, name)
        monkeypatch.setattr(vllm.VllmServer, name, lambda s: [seen.append(name), started.append(s), do(s)][-1])

    def broken() -> None:
        raise MetricError("no such scorer")

    noted("start")
    noted("is_ready")
    log = tmp_path / "vllm.log"
    with servers.serve_model(tmp_path, ServingConfig(), log, meanwhile=lambda: seen.append("meanwhile")) as (end,):
        assert seen[:3] == ["start", "meanwhile", "is_ready"] and seen.count("meanwhile") == 1
        assert end.takes_many
    with (
        pytest.raises(MetricError, match="no such scorer"),
        servers.serve_model(tmp_path, ServingConfig(), log, meanwhile=broken),
    ):
        pytest.fail("served in spite of the error")
    assert seen[-1] == "start" and not any(pids_of(server.url) for server in started)


def test_a_replica_that_dies_is_started_again_and_nothing_is_lost(
    recipe_file: Path, tmp_path: Path, scripted_vllm: None, capfd: pytest.CaptureFixture[str]
):
    log = tmp_path / "vllm.log"
    with servers.serve_model(tmp_path, ServingConfig(), log, places=[("0",), ("1",)]) as ends:
        assert len({e.url for e in ends}) == 2 and (tmp_path / "vllm-2.log").is_file()

        def kill() -> None:
            for pid in pids_of(ends[0].url):
                os.kill(pid, signal.SIGKILL)

        once_begun(tmp_path / "run", kill)
        run, some, tally, generator = sampled(recipe_file, tmp_path / "run", ends, "chain.chains_per_prompt=12")
        assert (tally.finished, tally.failed) == (len(some) * 12, 0) and generator.retries["server gone"] > 0
        told = capfd.readouterr().err
        assert "vLLM ended by itself" in told and "its requests go to the others" in told
    assert not pids_of(ends[0].url) and not pids_of(ends[1].url)
    keys = Counter((row["prompt_id"], row["chain"], row["step"], row["role"]) for row in run.rows("turns.jsonl"))
    assert set(keys.values()) == {1} and len(keys) == len(some) * 60


def test_the_only_replica_is_started_again_with_its_last_lines_shown(
    recipe_file: Path, tmp_path: Path, scripted_vllm: None, capfd: pytest.CaptureFixture[str]
):
    with servers.serve_model(tmp_path, ServingConfig(), tmp_path / "vllm.log") as ends:
        (end,) = ends
        first = pids_of(end.url)
        once_begun(tmp_path / "run", lambda: [os.kill(pid, signal.SIGKILL) for pid in first])
        _, some, tally, generator = sampled(recipe_file, tmp_path / "run", ends)
        assert (tally.finished, tally.failed, generator.retries["server back"]) == (len(some), 0, 1)
        assert pids_of(end.url) and pids_of(end.url) != first
    told = capfd.readouterr().err
    assert "Its last lines" in told and f"{end.url} is back" in told


def test_a_replica_that_cannot_be_started_again_stops_the_run(
    recipe_file: Path, tmp_path: Path, scripted_vllm: None, monkeypatch: pytest.MonkeyPatch
):
    with servers.serve_model(tmp_path, ServingConfig(), tmp_path / "vllm.log") as ends:
        (end,) = ends

        def kill() -> None:
            broken["now"] = True  # what is started from now on ends at once
            for pid in pids_of(end.url):
                os.kill(pid, signal.SIGKILL)

        broken = {"now": False}
        real = vllm_process.subprocess.Popen

        def popen(command: list[str], **keys: Any) -> Any:
            if broken["now"]:
                command = [command[0], "-c", "import sys; print('out of memory, say'); sys.exit(7)"]
            return real(command, **keys)

        monkeypatch.setattr(vllm_process.subprocess, "Popen", popen)
        once_begun(tmp_path / "run", kill)
        with pytest.raises(
            ServingError, match="did not come back in 4 tries: vLLM ended by itself(.|\n)*out of memory, say"
        ):
            sampled(recipe_file, tmp_path / "run", ends)
    assert sorted_rows(tmp_path / "run" / "turns.jsonl")
