"""How many adapters were scored on a test set: the ledger beside the runs."""

from __future__ import annotations

from typing import Any

from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_object

LEDGER = "test_sets.json"  # beside the runs: hash of a test set -> {adapters that were scored on it, unordered}


def looks_of(entry: Any) -> tuple[list[str], int]:
    """The adapters that an entry of the ledger names, in the order in which they were scored, and how many of the first
    have no known order: an older dsc sorted them."""
    if isinstance(entry, list):
        return entry, len(entry)
    return (list(entry["adapters"]), int(entry["unordered"])) if isinstance(entry, dict) else ([], 0)


def with_current_looks(run: Run, metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers with today's count of the adapters that were scored on the run's test set: others may have been
    since. As they are where there is no ledger beside the runs (a pulled repo)."""
    test_set, ledger = metrics.get("test_set"), run.folder.resolve().parent.parent / LEDGER
    if not test_set or not ledger.is_file():
        return metrics
    scored, _ = looks_of(read_object(ledger).get(test_set["id"]))
    return metrics | {"test_set": test_set | {"adapters_scored": len(scored)}} if scored else metrics
