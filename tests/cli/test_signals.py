"""Signals in the middle of the work: one sentence, no traceback, nothing lost, and the process is gone at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.scripted_server import make_server

FAREWELL = "what is finished is kept; the same command goes on from there"


@pytest.fixture
def sampling(recipe_file: Path, dsc, home: Path) -> Iterator[subprocess.Popen[str]]:
    """A `dsc sample` that has finished its first chains."""
    server = make_server(pause=0.1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["sample", str(recipe_file), f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]"]
    env = {**os.environ, "DSC_HUB_HOME": str(home), "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-m", "dsc_hub", *words, "serving.concurrency=4"],
        cwd=dsc.work,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(dsc.work.glob("runs/*/*/chains.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    yield child
    child.kill()
    server.shutdown()


def test_sigterm_says_that_what_is_finished_is_kept(sampling: subprocess.Popen[str]):
    sampling.send_signal(signal.SIGTERM)
    _, said = sampling.communicate(timeout=60)
    assert sampling.returncode == 143 and f"terminated: {FAREWELL}" in said and "Traceback" not in said, said


def test_however_often_ctrl_c_is_pressed_there_is_no_traceback(sampling: subprocess.Popen[str]):
    for _ in range(40):
        if sampling.poll() is not None:
            break
        sampling.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = sampling.communicate(timeout=60)
    assert sampling.returncode == 130 and f"interrupted: {FAREWELL}" in said and "Traceback" not in said, said


def test_a_command_that_loaded_torch_ends_without_looking_for_garbage(tmp_path: Path):
    """What was registered to happen at the exit happens, the exit code is the command's, and nothing is finalised."""
    code = (
        "import sys, types; sys.modules['torch'] = types.ModuleType('torch')\n"
        "from dsc_hub.cli import main\n"
        "import os\nclass Late:\n    def __del__(self, write=os.write): write(1, b'finalised')\n"
        "late = Late(); late.itself = late\n"
        "def command(**_):\n    import atexit; atexit.register(print, 'at exit'); print('done'); sys.exit(7)\n"
        "main.cli = command; main.main()"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (child.returncode, child.stdout.split("\n")[:2]) == (7, ["done", "at exit"]), child.stderr
    assert "finalised" not in child.stdout
