"""How often each detector of hygiene is right, on texts of real output that were labelled by reading.

    python -m tests.benchmarks.hygiene            precision and recall by detector, on both halves
    python -m tests.benchmarks.hygiene --errors   and every text that a detector gets wrong

tests/data/labelled_texts.jsonl: 300 answers and revisions of SmolLM2-135M-Instruct and of an adapter on it, from chains with
several critique and revision texts, and from prompts in German, French, Spanish and Italian. How they were labelled, and
by whom, is in tests/data/README.md. The detectors were written on the development half; the other was not looked at. "cut at the length limit" and "empty" are facts, not judgements,
and need no labels; "does not name its subject" is a comparison of names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsc_hub import stats
from dsc_hub.chain import hygiene
from dsc_hub.chain.language import in_another_language

DATA = Path(__file__).parent.parent / "data" / "labelled_texts.jsonl"
DETECTORS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "meta": lambda t: hygiene.talks_about_the_conversation(t["text"]),
    "repeats": lambda t: hygiene.repeats_itself(t["text"], t["subject"]),
    "copies": lambda t: hygiene.copies(t["text"], t["critique"]),
    "language": lambda t: in_another_language(t["text"], t["prompt"]),
}


def labelled(half: str) -> list[dict[str, Any]]:
    """The labelled texts of one half: `development` or `held out`."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["half"] == half]


def measure(half: str, name: str) -> dict[str, Any]:
    """Counts and shares of one detector on one half: found, missed, wrongly, precision, recall (None without any)."""
    found, missed, wrongly = [], [], []
    for row in labelled(half):
        is_so, said = name in row["labels"], DETECTORS[name](row)
        (found if is_so and said else missed if is_so else wrongly if said else []).append(row)
    said, are = len(found) + len(wrongly), len(found) + len(missed)
    return {
        "found": found,
        "missed": missed,
        "wrongly": wrongly,
        "precision": len(found) / said if said else None,
        "recall": len(found) / are if are else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="show the texts that a detector gets wrong")
    errors = parser.parse_args().errors
    print(
        f"{'half':<12} {'detector':<9} {'texts':>5} {'labelled':>8} {'precision (95 % Wilson)':>26} {'recall (95 % Wilson)':>26}"
    )
    for half in ("development", "held out"):
        texts = labelled(half)
        for name in DETECTORS:
            m = measure(half, name)
            hits, said, are = (len(x) for x in (m["found"], m["found"] + m["wrongly"], m["found"] + m["missed"]))
            print(f"{half:<12} {name:<9} {len(texts):>5} {are:>8} {_share(hits, said):>26} {_share(hits, are):>26}")
            for kind in ("missed", "wrongly") if errors else ():
                for row in m[kind]:
                    print(f"    {kind} {row['id']}: {' '.join(row['text'].split())}")


def _share(hits: int, of: int) -> str:
    if not of:
        return "none"
    low, high = stats.wilson(hits, of)
    return f"{hits}/{of} = {hits / of:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    main()
