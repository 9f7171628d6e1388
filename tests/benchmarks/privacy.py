"""How well the packaged scorers of privacy find people and other personal data, on sentences with known personal data:

    pip install presidio-evaluator      # generates them, offline and seeded
    python -m tests.benchmarks.privacy

Per scorer and kind: precision and recall with 95 % Wilson intervals, F1, texts a second. A mention counts as found if a
mention of its kind overlaps it, and as true if it overlaps one of the sentence's. And in how many of the layouts of
tests/name_layouts.py (lists, tables, letters ...) it counts as many people as a reader, and its counts in the others.

    python -m tests.benchmarks.privacy --layouts                     # only these; they need no presidio-evaluator
    git show COMMIT:dsc_hub/metrics/privacy/privacy.py > /tmp/before.py
    python -m tests.benchmarks.privacy --metric /tmp/before.py dsc_hub/metrics/privacy/privacy.py    # both, on the same texts
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import Any

import evaluate
from scipy.stats import binomtest

from dsc_hub.metrics.privacy.privacy import KINDS, PERSON
from tests.conftest import ROOT
from tests.name_layouts import LAYOUTS

FILE = ROOT / "dsc_hub" / "metrics" / "privacy" / "privacy.py"
SCORERS = ("spacy", "presidio", "rampart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--metric", nargs="+", default=[str(FILE)], help="files of the measurement, to compare")
    parser.add_argument("--layouts", action="store_true", help="only the layouts")
    given = parser.parse_args()
    samples = [] if given.layouts else _sentences(given.n, given.seed)
    texts = [s.full_text for s in samples]
    truth = [[(s.entity_value, KINDS[s.entity_type]) for s in of.spans if s.entity_type in KINDS] for of in samples]
    print(
        f"{len(texts)} sentences, {sum(kind == PERSON for of in truth for _, kind in of)} people; {len(LAYOUTS)} layouts"
    )
    for file in given.metric:
        for scorer in SCORERS:
            measure = evaluate.load(file, config_name=scorer, keep_in_memory=True)
            print(f"{scorer} of {file}")
            if samples:
                _score(measure, texts, truth)
            _layouts(measure)


def _sentences(n: int, seed: int) -> list[Any]:
    random.seed(seed)  # the package draws names' initials when it is imported; times of day stay as random as the clock
    try:
        from presidio_evaluator.data_generator import PresidioSentenceFaker
    except ImportError as e:
        sys.exit(f"{e}: pip install presidio-evaluator")
    return PresidioSentenceFaker("en_US", lower_case_ratio=0.0, random_seed=seed).generate_new_fake_sentences(n)


def _score(measure: Any, texts: list[str], truth: list[list[tuple[str, str]]]) -> None:
    started = time.perf_counter()
    result = measure.compute(data=texts)["found"]
    print(f"  {len(texts) / (time.perf_counter() - started):.0f} texts/s")
    for kind in sorted({k for of in truth for _, k in of}):
        _tell(kind, truth, result)


def _layouts(measure: Any) -> None:
    result = measure.compute(data=[layout.text for layout in LAYOUTS])["found"]
    counts = [len(kinds.get(PERSON, [])) for kinds in result]
    wrong = [f"{la.name} {n} not {la.count}" for la, n in zip(LAYOUTS, counts, strict=True) if n != la.count]
    print(f"  layouts {len(LAYOUTS) - len(wrong)}/{len(LAYOUTS)} as counted by hand; {'; '.join(wrong)}")


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
