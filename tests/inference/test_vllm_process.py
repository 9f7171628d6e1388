"""A process that imports vLLM before its server's arguments are known: who becomes the server, and what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dsc_hub.config.serving import ServingConfig
from dsc_hub.inference import vllm, vllm_forks, vllm_process, vllm_start
from dsc_hub.system import supervisor
from tests.conftest import ROOT

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
    lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in supervisor.descendants(os.getpid())]
    assert len(lines) >= 4 and "secret" not in "".join(lines) + repr(server)
    for process in (server, second):
        process.end()
        assert process.exit_code is not None


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


# What `vllm_start` runs in these tests: the server prints its arguments, and what it is a fork of can't be imported.
START = """
import os, sys
from dsc_hub.inference import vllm_forks, vllm_start
vllm_forks.SERVER = vllm_start.SERVER = "server_here"
vllm_start.PARENT = "parent_here"
vllm_start.main()
"""


@pytest.mark.parametrize("preload", ["", "/lib/of/libiomp5.so"])
@pytest.mark.parametrize("later", [False, True])
def test_where_nothing_can_be_forked_the_server_starts_without_forks(tmp_path: Path, preload: str, later: bool):
    """So the reason why vLLM can't be imported is in the log's last lines, if there is one."""
    assert vllm_start.SERVER == vllm_forks.SERVER
    (tmp_path / "parent_here.py").write_text("raise RuntimeError('a library is missing')")
    (tmp_path / "server_here.py").write_text(
        "import os, sys\nif __name__ == '__main__': print(sys.argv[1:], os.environ['VLLM_API_KEY'])"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}", "VLLM_API_KEY": "key", "LD_PRELOAD": preload}
    done = subprocess.run(
        [sys.executable, "-c", START, *([vllm_start.LATER] if later else ["--model", "a"])],
        env=environment,
        input=json.dumps({"arguments": ["--model", "a"], "api_key": "key"}) + "\n" if later else None,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.returncode) == ("['--model', 'a'] key\n", 0), done.stderr
    assert ("a library is missing" in done.stderr) == bool(preload)


@pytest.mark.parametrize("code", [0, 3, -9])
def test_the_process_ends_as_its_server_did(code: int):
    ends = f"from dsc_hub.inference import vllm_start; vllm_start._end_like({code})"
    assert subprocess.run([sys.executable, "-c", ends], cwd=ROOT).returncode == code


def test_the_end_of_a_fork_server_is_told_by_its_signal():
    ends = """
import os, signal, time
from multiprocessing import forkserver
from dsc_hub.inference import vllm_start
forkserver.ensure_running()
os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
time.sleep(0.5)
vllm_start._end_like(255)
"""
    assert subprocess.run([sys.executable, "-c", ends], cwd=ROOT).returncode == -9
