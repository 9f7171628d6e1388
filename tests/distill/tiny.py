"""A run that is ready to be trained, for a tiny model: rows, facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.runs.run import Run
from tests import fixture_run

EOS = 2
PUBLISHED, COMMIT = "someone/tiny", "0123456789abcdef"
QUICK = {"num_train_epochs": 1, "learning_rate": 0.01}


def row(n: int, answer: str = "A warm and lovely film.") -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Review film number {n}."}],
        "completion": [{"role": "assistant", "content": answer * (1 + n % 3)}],
        "prompt_id": f"{n:016x}",
        "group": f"film {n}",
        "chain": 0,
        "reward": 0.9,
        "first_reward": -0.5,
    }


def pair(n: int) -> dict[str, Any]:
    """A preference pair."""
    return {
        "prompt": [{"role": "user", "content": f"Review film number {n}."}],
        "chosen": [{"role": "assistant", "content": f"A warm and lovely film, number {n}."}],
        "rejected": [{"role": "assistant", "content": "A dull film."}],
        "margin": 1.0,
    }


def make_run(
    folder: Path, base: Path, rows=None, validation=None, system=None, context=2048, config="sft", **section
) -> Run:
    run = Run(folder)
    sft = run["dataset"] / config
    sft.mkdir(parents=True)
    pq.write_table(
        pa.Table.from_pylist(rows if rows is not None else [row(n) for n in range(6)]),
        sft / "train-00000-of-00001.parquet",
    )
    if validation is not None:
        pq.write_table(pa.Table.from_pylist(validation), sft / "validation-00000-of-00001.parquet")
    distill_section = {"method": "qlora", "sft": QUICK, "lora": {}, "quantization": {}, "processes": 1} | section
    facts = fixture_run.facts()
    facts["recipe"] |= {"seed": 7, "serving": {"context": context}, "distill": distill_section}
    facts["recipe"]["chain"]["system"] = system
    facts["model"] |= {"folder": str(base), "published_as": PUBLISHED, "published_commit": COMMIT}
    run.add_facts(**facts)
    return run
