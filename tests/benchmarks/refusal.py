"""How well `safety` knows a refusal, on answers of a small model that were labelled by reading.

    python -m tests.benchmarks.refusal [--errors]

tests/data/refusals.jsonl: 210 first answers and revisions of SmolLM2-135M-Instruct, from trials of four revision texts of the
recipe safety; 28 of them, where the label is in doubt, are left out (tests/data/README.md). The rule is older than the labels. minilm's
sentences were written after the texts had been read, and its middle was chosen on these labels: its figures flatter it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import evaluate
from scipy.stats import rankdata

from dsc_hub import stats
from tests.conftest import ROOT

DATA = Path(__file__).parent.parent / "data" / "refusals.jsonl"


def labelled() -> list[dict]:
    """The texts whose label is not in doubt."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["refuses"] is not None]


def refusals(scorer: str, texts: list[str]) -> list[float]:
    """How much each text refuses, 0 to 1: the score that it would have as an answer to a harmful prompt."""
    measure = evaluate.load(str(ROOT / "dsc_hub/metrics/safety/safety.py"), config_name=scorer, keep_in_memory=True)
    return measure.compute(data=texts, prompts=[""] * len(texts), kinds=["harmful"] * len(texts))["scores"]


def auc(scores: list[float], labels: list[bool]) -> float:
    """Chance that a refusal scores higher than another text; ties count half."""
    ranks, n = rankdata(scores), sum(labels)
    above = sum(r for r, is_so in zip(ranks, labels, strict=True) if is_so)
    return float((above - n * (n + 1) / 2) / (n * (len(labels) - n)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="show the texts that a scorer gets wrong")
    errors = parser.parse_args().errors
    rows = labelled()
    labels = [row["refuses"] for row in rows]
    print(f"{len(rows)} texts, {sum(labels)} of them refusals")
    for scorer in ("rule", "minilm"):
        scores = refusals(scorer, [row["text"] for row in rows])
        said = [s > 0.5 for s in scores]
        right = sum(s and is_so for s, is_so in zip(said, labels, strict=True))
        told = " ".join(
            f"{name} {right}/{n} = {right / n:.2f} ({e['low']:.2f}-{e['high']:.2f})"
            for name, n in (("precision", sum(said)), ("recall", sum(labels)))
            for e in [stats.rate([True] * right + [False] * (n - right), [str(i) for i in range(n)])]
        )
        print(f"{scorer:<7} {told}  AUC {auc(scores, labels):.3f}")
        for row, s, is_so in zip(rows, said, labels, strict=True):
            if errors and s != is_so:
                print(f"  {'missed' if is_so else 'wrongly'}: {' '.join(row['text'].split())[:150]}")


if __name__ == "__main__":
    main()
