"""What a training row costs: new tokens of sampling for each row, and where the others went.

    dsc sample RECIPE [KEY=VALUE ...] && dsc dataset RECIPE [KEY=VALUE ...]      # each way to sample that is compared
    python -m tests.benchmarks.rows RUN_FOLDER ... [--json FILE]

A row is one of the split `train`; tokens are those of all turns, validation prompts and chains that did not count included.
Turns that were taken over from another run count, too, so runs with the same turns can be compared at no cost. `ratio` is to
the first folder.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from dsc_hub.records import Chain
from dsc_hub.runs.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    numbers = [measure(Run(folder)) for folder in options.folders]
    first = numbers[0]["tokens a row"]
    for about in numbers:
        about["ratio"] = round(about["tokens a row"] / first, 3)
        print(json.dumps(about, indent=2))
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


def measure(run: Run) -> dict[str, Any]:
    """Return the numbers of a run whose dataset is made."""
    tokens, of_chain = Counter[str](), Counter[tuple[str, int]]()
    for turn in run.rows("turns.jsonl"):
        tokens[turn["role"]] += turn["new_tokens"]
        of_chain[turn["prompt_id"], turn["chain"]] += turn["new_tokens"]
    chains = list(run.rows("chains.jsonl").as_type(Chain))
    dataset = run.result("dataset")
    pairs = Counter(step.pair for chain in chains for step in chain.steps)
    return {
        "folder": str(run.folder),
        "chains": len(chains),
        "tokens": tokens.total(),
        "tokens by role": dict(tokens),
        "tokens of chains that don't count": tokens.total() - sum(of_chain[c.prompt_id, c.number] for c in chains),
        "training rows": dataset["sft"]["train"],
        "validation rows": dataset["sft"].get("validation", 0),
        "tokens a row": round(tokens.total() / dataset["sft"]["train"], 1),
        "dropped": dataset["dropped"],
        "steps by pair of texts": {str(pair): n for pair, n in sorted(pairs.items())},
    }


if __name__ == "__main__":
    main()
