"""How long `make demo` takes from nothing, stage by stage, with the starts of vLLM apart.

    python -m tests.benchmarks.first_run [--runs 3] [--json FILE] [--keep FOLDER]

Each run is a fresh clone of this repository's HEAD with a virtual environment and a home of its own, one after the other; packages
come from where pip is told to look. Medians over the runs. Nothing else should run on the machine meanwhile. `--keep` copies the last
clone and its home, without what was installed, to a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from dsc_hub.system import machine

ROOT = Path(__file__).parents[2]
READY = re.compile(r"vLLM serves .*, ready after (?:(\d+) min )?(\d+) s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    runs = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="first-run-") as place:
            runs.append(first_run(Path(place)))
            if options.keep:
                shutil.rmtree(options.keep, ignore_errors=True)
                shutil.copytree(place, options.keep, symlinks=True, ignore=shutil.ignore_patterns(".venv", "uv"))
        print(json.dumps(runs[-1], indent=2), flush=True)
    medians = {key: round(statistics.median(run[key] for run in runs), 1) for key in runs[0]}
    numbers = {"medians": medians, "runs": runs, "hardware": machine.hardware(), "versions": machine.versions()}
    print(json.dumps(numbers, indent=2))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


def first_run(place: Path) -> dict[str, float]:
    """Return seconds: of installing, of each stage, of vLLM's starts in order, of all together; and tokens of sampling."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place / "clone")], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "DSC_", "VIRTUAL_ENV", "PYTHONPATH"))}
    env |= {"HOME": str(place / "home")}
    (place / "home").mkdir()
    began = time.monotonic()
    subprocess.run(["make", "setup"], cwd=place / "clone", env=env, check=True)
    installed = time.monotonic()
    subprocess.run(["make", "demo"], cwd=place / "clone", env=env, check=True)
    (run,) = (place / "clone/runs/quickstart").iterdir()
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    starts = [60 * int(m[1] or 0) + int(m[2]) for m in READY.finditer((run / "log.txt").read_text())]
    return {
        "installing": round(installed - began, 1),
        **metrics["stages"],
        **{f"start {i} of vLLM": float(seconds) for i, seconds in enumerate(starts, 1)},
        "together": round(time.monotonic() - began, 1),
        "new tokens of sampling": metrics["sampling"]["new_tokens"],
        "tokens/s of sampling": metrics["sampling"]["tokens_per_s"],
    }


if __name__ == "__main__":
    main()
