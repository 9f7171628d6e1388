"""A child that a signal ended is told as that, wherever it ran."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dsc_hub.errors import ModelError
from dsc_hub.inference import weights
from dsc_hub.system.endings import shown_ending

KILLS_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_codes_in_words():
    assert (
        shown_ending(3) == "exit code 3" and shown_ending(1) == "exit code 1" and shown_ending(255) == "exit code 255"
    )
    assert shown_ending(-11) == shown_ending(139) == "signal 11, SIGSEGV"
    assert shown_ending(-9) == shown_ending(137) == "signal 9, SIGKILL: most often the system, for want of memory"


def test_the_supervisor_passes_on_the_signal_that_ended_its_child():
    command = [sys.executable, "-m", "dsc_hub.system.supervisor", sys.executable, "-c", KILLS_ITSELF]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.wait(30) == 137


def test_a_conversion_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(weights.sys, "executable", "/bin/sh")  # `sh -c` takes what python would
    with pytest.raises(ModelError) as e:
        weights._in_child("x; kill -9 $$; #", [], "the model")
    assert "signal 9, SIGKILL: most often the system, for want of memory" in str(e.value)


def test_the_supervisor_passes_on_what_is_written_where_it_shall():
    echoes = "import sys; line = sys.stdin.readline(); print(line, end='', flush=True); print(sys.stdin.read())"
    supervised = [sys.executable, "-m", "dsc_hub.system.supervisor"]
    with subprocess.Popen(
        [*supervised, "--grace", "1", "--pass-input", sys.executable, "-c", echoes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin and child.stdout
        child.stdin.write("a line\n")
        child.stdin.flush()
        assert child.stdout.readline() == "a line\n"
        child.stdin.close()
        assert child.wait(30) == 1
    with subprocess.Popen(
        [*supervised, sys.executable, "-c", echoes], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin and other.stdout
        other.stdin.write("a line\n")
        other.stdin.flush()
        assert other.wait(30) == 0 and other.stdout.read() == "\n"  # its standard input is empty
