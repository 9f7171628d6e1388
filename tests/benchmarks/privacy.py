"""How well the packaged scorers of privacy find people and other personal data, on sentences with known personal data:

    pip install presidio-evaluator      # generates them, offline and seeded
    python -m tests.benchmarks.privacy

Per scorer and kind: precision and recall with 95 % Wilson intervals, F1, texts a second. A mention counts as found if a mention of
its kind overlaps it, and as true if it overlaps one of the sentence's.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import evaluate
from scipy.stats import binomtest

from dsc_hub.metrics.privacy.privacy import KINDS, PERSON
from tests.conftest import ROOT

FILE = ROOT / "dsc_hub" / "metrics" / "privacy" / "privacy.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    try:
        from presidio_evaluator.data_generator import PresidioSentenceFaker
    except ImportError as e:
        sys.exit(f"{e}: pip install presidio-evaluator")
    samples = PresidioSentenceFaker("en_US", lower_case_ratio=0.0, random_seed=given.seed).generate_new_fake_sentences(
        given.n
    )
    texts = [s.full_text for s in samples]
    truth = [[(s.entity_value, KINDS[s.entity_type]) for s in of.spans if s.entity_type in KINDS] for of in samples]
    print(f"{len(texts)} sentences, {sum(kind == PERSON for of in truth for _, kind in of)} people")
    for scorer in ("spacy", "presidio", "rampart"):
        measure = evaluate.load(str(FILE), config_name=scorer, keep_in_memory=True)
        started = time.perf_counter()
        found = measure.compute(data=texts)["found"]
        print(f"{scorer}: {len(texts) / (time.perf_counter() - started):.0f} texts/s")
        for kind in sorted({k for of in truth for _, k in of}):
            _tell(kind, truth, found)


def _tell(kind: str, truth: list[list[tuple[str, str]]], found: list[dict[str, list[str]]]) -> None:
    pairs = [([v for v, k in of if k == kind], got.get(kind, [])) for of, got in zip(truth, found, strict=True)]
    hits = [sum(any(_overlap(t, g) for g in got) for t in true) for true, got in pairs]
    good = [sum(any(_overlap(t, g) for t in true) for g in got) for true, got in pairs]
    wanted, said = sum(len(true) for true, _ in pairs), sum(len(got) for _, got in pairs)
    if said:
        precision, recall = sum(good) / said, sum(hits) / wanted
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        print(f"  {kind:8} precision {_share(sum(good), said)}  recall {_share(sum(hits), wanted)}  F1 {f1:.3f}")


def _overlap(one: str, other: str) -> bool:
    return one in other or other in one or bool(set(one.split()) & set(other.split()))


def _share(k: int, n: int) -> str:
    at: Any = binomtest(k, n).proportion_ci(method="wilson")
    return f"{k}/{n} = {k / n:.2f} ({at.low:.2f}-{at.high:.2f})"


if __name__ == "__main__":
    main()
