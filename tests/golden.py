"""The rendered cards in model_cards/examples, and the facts that they are made of: `python -m tests.golden RUN` keeps a run's.

Kept are run.json as it is published, metrics.json, the two chains and all answers that the cards quote or count; of the
dataset's files their counts and columns alone.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.data import dataset
from dsc_hub.evaluation.answers import ANSWERS
from dsc_hub.publish import bundle
from dsc_hub.report import cards
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_json, write_json
from tests.conftest import ROOT

KEPT = ROOT / "tests" / "data" / "golden"
SHOWN = ROOT / "model_cards" / "examples"


def keep(run: Run) -> str:
    """Take from a finished run what its cards are made of; the recipe's name."""
    name = run.facts.recipe.name
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        bundle._public_facts(run.facts, "adapter", Path(work)).replace(folder / "run.json")
        config = read_json(run["adapter/adapter_config.json"])
    write_json(folder / "metrics.json", run.metrics)
    write_json(folder / "adapter_config.json", {key: config[key] for key in ("r", "rank_pattern")})
    with gzip.GzipFile(folder / "answers.jsonl.gz", "wb", mtime=0) as file:
        file.write(run["evaluation/answers.jsonl"].read_bytes())
    shown = cards._example_chains(run)
    (folder / "chains.jsonl").write_text("".join(json.dumps(x["chain"].as_row()) + "\n" for x in shown))
    wanted = {x["chain"].prompt_id for x in shown}
    rows = [row for row in run.rows("prompts.jsonl") if row["id"] in wanted]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def render(name: str, folder: Path) -> dict[str, str]:
    """The cards of a kept run, by kind, rendered in `folder`."""
    kept, run = KEPT / name, Run(folder)
    run["evaluation"].mkdir(parents=True)
    for file in ("run.json", "metrics.json", "chains.jsonl", "prompts.jsonl"):
        run[file].write_bytes((kept / file).read_bytes())
    run["evaluation/answers.jsonl"].write_bytes(gzip.decompress((kept / "answers.jsonl.gz").read_bytes()))
    run["adapter"].mkdir()
    run["adapter/adapter_config.json"].write_bytes((kept / "adapter_config.json").read_bytes())
    run.finish("evaluation", "kept", 0.0, {})
    numbers = run.metrics
    counts = {config: numbers["dataset"].get(config, {}) for config in dataset.SCHEMAS}
    answers = sum(a["reward"]["n"] + a["reward"]["unscored"] for a in numbers["evaluation"]["arms"].values())
    counts["evaluation"] = {numbers["evaluation"]["split"]: answers}
    for config, splits in counts.items():
        schema = dataset.SCHEMAS.get(config, ANSWERS)
        for split, n in splits.items():
            path = run[f"dataset/{config}/{split}-00000-of-00001.parquet"]
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist([{}] * n, schema=schema), path)
    run["cards"].mkdir()
    for plot in {p for plots in cards.PLOTS.values() for p in plots}:
        run[f"cards/{plot}.png"].touch()
    return {kind: (run["cards"] / kind / "README.md").read_text(encoding="utf-8") for kind in cards.build_cards(run)}


if __name__ == "__main__":
    names = [keep(Run(Path(folder))) for folder in sys.argv[1:]] or sorted(p.name for p in KEPT.iterdir())
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            for kind, text in render(name, Path(work)).items():
                target = SHOWN / name / f"{kind}.md"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                print(target.relative_to(ROOT))
