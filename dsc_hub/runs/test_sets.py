"""The ledger beside the runs: which adapters were scored on each test set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsc_hub.runs.metrics_schema import Metrics
from dsc_hub.runs.run import Run
from dsc_hub.system.files import read_object

LEDGER = "test_sets.json"  # beside the runs: hash of a test set -> {adapters, unordered}, see `scored_adapters`


def set_id(prompt_ids: Iterable[str]) -> str:
    """Return the name of a test set in the ledger: a hash of its prompts' ids."""
    return hashlib.sha256("\n".join(sorted(prompt_ids)).encode()).hexdigest()[:12]


def looks_before(runs: Path, prompt_ids: Iterable[str], adapter_sha256: str | None) -> int:
    """Return how many adapters were scored on a test set before one, by the ledger in the folder of the runs.

    `adapter_sha256` None: one that is still to be trained.
    """
    ledger = runs / LEDGER
    if not ledger.is_file():
        return 0
    scored, _ = scored_adapters(read_object(ledger).get(set_id(prompt_ids)))
    return scored.index(adapter_sha256) if adapter_sha256 in scored else len(scored)


def scored_adapters(entry: Any) -> tuple[list[str], int]:
    """Return the adapters of a ledger entry in scoring order, and how many of the first ones have no known order.

    (An older dsc sorted them.)
    """
    if isinstance(entry, list):
        return entry, len(entry)
    return (list(entry["adapters"]), int(entry["unordered"])) if isinstance(entry, dict) else ([], 0)


def with_current_looks(run: Run, metrics: Metrics) -> Metrics:
    """Return the metrics with the ledger's current number of adapters scored on the run's test set.

    Other adapters may have been scored since the number was recorded. Without a ledger beside the runs (a pulled repo)
    the metrics are returned unchanged.
    """
    test_set, ledger = metrics.test_set, run.folder.resolve().parent.parent / LEDGER
    if test_set is None or not ledger.is_file():
        return metrics
    scored, _ = scored_adapters(read_object(ledger).get(test_set.id))
    if not scored:
        return metrics
    return metrics.model_copy(update={"test_set": test_set.model_copy(update={"adapters_scored": len(scored)})})
