"""A process that imports vLLM before its server's arguments are known: who becomes the server, and what is left."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsc_hub.config.serving import ServingConfig
from dsc_hub.inference import vllm, vllm_process

STARTS = """
import sys, time
if sys.argv[1:] == ["--arguments-later"]:
    print("imported", flush=True)
    print("given", sys.stdin.readline().strip(), flush=True)
else:
    print("started with", *sys.argv[1:], flush=True)
time.sleep(60)
"""
COMMAND = [sys.executable, "-m", "starts", "--model", "a folder"]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """That of a server. What it would start is a script."""
    (tmp_path / "starts.py").write_text(STARTS)
    monkeypatch.setattr(vllm_process, "START", "starts")
    yield {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "VLLM_API_KEY": "secret"}
    assert vllm_process._early is None


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_the_server_is_the_process_that_was_there_before(environment, tmp_path: Path):
    log = tmp_path / "logs" / "vllm.log"
    with vllm_process.importing_early({**environment, "VLLM_API_KEY": ""}, log):
        wait_for(lambda: log.read_text() == "imported\n")
        server = vllm_process.start_process(COMMAND, environment, log)
        wait_for(lambda: log.read_text().count("\n") == 2)
        second = vllm_process.start_process(COMMAND, environment, log)  # after the first one's death, say
        wait_for(lambda: "started with --model a folder\n" in log.read_text())
    word, _, given = log.read_text().splitlines()[1].partition(" ")
    assert word == "given" and json.loads(given) == {"arguments": ["--model", "a folder"], "api_key": "secret"}
    assert server.exit_code is None and second.exit_code is None
    assert (server.log_from, second.log_from > 0) == (0, True)
    for process in (server, second):
        process.end()
        assert process.exit_code is not None
    assert b"secret" not in Path(f"/proc/{os.getpid()}/cmdline").read_bytes()


@pytest.mark.parametrize("other", ["environment", "log", "it has ended", "command"])
def test_another_server_starts_as_ever_and_the_process_is_ended(environment, tmp_path: Path, other: str):
    log = tmp_path / "vllm.log"
    with vllm_process.importing_early(environment, log):
        early = vllm_process._early
        assert early
        wait_for(lambda: log.read_text() == "imported\n")
        if other == "it has ended":
            early.end()
        wanted = tmp_path / "other.log" if other == "log" else log
        given = environment | ({"OMP_NUM_THREADS": "1"} if other == "environment" else {})
        command = [sys.executable, "-c", "print('started with --model', 'a folder')"] if other == "command" else COMMAND
        server = vllm_process.start_process(command, given, wanted)
        wait_for(lambda: "started with --model a folder" in wanted.read_text())
        assert server is not early and early.exit_code is not None
        server.end()
    assert wanted.exists()


def test_without_a_server_nothing_is_left(environment, tmp_path: Path):
    new, old = tmp_path / "new.log", tmp_path / "old.log"
    old.write_text("of an earlier server\n")
    for log in (new, old):
        with pytest.raises(KeyboardInterrupt), vllm_process.importing_early(environment, log):
            first = vllm_process._early
            with vllm_process.importing_early(environment, log):
                assert vllm_process._early is first is not None
            assert first.exit_code is None
            raise KeyboardInterrupt
        assert first.exit_code is not None
    assert not new.exists() and old.read_text().startswith("of an earlier server\n")


@pytest.mark.parametrize(
    ("on_cpu", "replicas", "imports"), [(True, "auto", True), (True, 1, True), (True, 2, False), (False, "auto", False)]
)
def test_only_on_a_cpu_and_for_one_server(environment, monkeypatch, tmp_path: Path, on_cpu, replicas, imports):
    monkeypatch.setattr(vllm, "vllm_on_cpu", lambda: on_cpu)
    monkeypatch.setattr(vllm, "vllm_environment", lambda *_: environment)
    with vllm.imported_early(ServingConfig(replicas=replicas), tmp_path / "vllm.log"):
        assert bool(vllm_process._early) == imports
