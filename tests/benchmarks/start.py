"""How long commands take to begin: `dsc sample` until its first request reaches a server, `dsc plan`, `dsc --version`.

    python -m tests.benchmarks.start [--times 5] [--json FILE] [--profile FILE]

`first` is the first start of each, with a home that is empty for the first of all: it converts the packaged model. The
others are medians of further starts, each with a run folder of its own. The server is up and answers at once. Nothing
else should run on the machine meanwhile. `--profile` writes what cProfile says of one more `dsc sample` (python -m
pstats FILE).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from dsc_hub.system import machine
from tests.scripted_server import answer_to, make_server

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    asked: list[float] = []

    def answer(body: dict[str, Any]) -> str:
        asked.append(time.monotonic())
        return answer_to(body)

    server = make_server(answer=answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    external = f"serving.endpoints=[http://127.0.0.1:{server.server_port}/v1]"
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        place = Path(folder)
        sample = ["sample", "quickstart", external]
        commands = {
            "dsc sample, first request": sample,
            "dsc plan": ["plan", "quickstart"],
            "dsc --version": ["--version"],
        }
        for name, words in commands.items():
            seconds = []
            for i in range(options.times + 1):
                asked.clear()
                began = time.monotonic()
                # Another name is another run folder; `seed` would be another run, too, with other requests.
                _run([*words, *([f"name=start{i}"] if words is sample else [])], place)
                seconds.append((asked[0] if words is sample else time.monotonic()) - began)
            numbers[name] = {"first": round(seconds[0], 2), "then": round(statistics.median(seconds[1:]), 2)}
            print(name, numbers[name], flush=True)
        if options.profile:
            _run([*sample, "name=profiled"], place, "-m", "cProfile", "-o", str(options.profile.resolve()))
    numbers |= {"hardware": machine.hardware(), "versions": machine.versions()}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


def _run(words: list[str], place: Path, *python: str) -> None:
    env = os.environ | {"DSC_HUB_HOME": str(place / "home"), "PYTHONPATH": str(ROOT)}
    env |= {"PYTHONPYCACHEPREFIX": "", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, *python, "-m", "dsc_hub", *words]
    subprocess.run(command, cwd=place, env=env, check=True, capture_output=True)


if __name__ == "__main__":
    main()
