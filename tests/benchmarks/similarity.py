"""Does `similarity` know which answers are about the same thing? Answers of a real run, by the event that they were asked about.

    python -m tests.benchmarks.similarity

The base's answers of the example run of the recipe privacy (tests/data/golden/privacy): 128 reports on 16 events. Every pair is
scored; the label, same event or not, comes with the data. AUC: the chance that a pair about the same event scores higher than a
pair about two. The bar is what a veto with that likeness would let pass.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time

import evaluate

from tests.benchmarks.refusal import auc
from tests.conftest import ROOT

ANSWERS = ROOT / "tests" / "data" / "golden" / "privacy" / "answers.jsonl.gz"


def passed(scores: list[float], same: list[bool], which: bool, bar: float) -> float:
    """Share of the pairs with the label `which` that score at least `bar`."""
    return sum(s >= bar for s, is_so in zip(scores, same, strict=True) if is_so is which) / same.count(which)


def main() -> None:
    rows = [json.loads(line) for line in gzip.decompress(ANSWERS.read_bytes()).splitlines()]
    rows = [row for row in rows if row["arm"] == "base"]
    pairs = list(itertools.combinations(rows, 2))
    same = [a["group"] == b["group"] for a, b in pairs]
    print(f"{len(pairs)} pairs, {sum(same)} of them about the same event")
    for scorer in ("minilm", "rouge_l"):
        measure = evaluate.load(
            str(ROOT / "dsc_hub/metrics/similarity/similarity.py"), config_name=scorer, keep_in_memory=True
        )
        started = time.monotonic()
        scores = measure.compute(data=[a["text"] for a, _ in pairs], references=[b["text"] for _, b in pairs])["scores"]
        took = time.monotonic() - started
        bars = "; ".join(
            f"{bar}: {passed(scores, same, True, bar):.0%} of the same, {passed(scores, same, False, bar):.0%} of others"
            for bar in (0.2, 0.3, 0.4, 0.5)
        )
        print(f"{scorer:<8} AUC {auc(scores, same):.3f}, {took:.0f} s; passes at {bars}")


if __name__ == "__main__":
    main()
