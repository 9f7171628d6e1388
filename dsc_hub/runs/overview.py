"""What the run folders below `runs` are: what differs between them, how far they came, their verdict and size."""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.config.stages import STAGES
from dsc_hub.errors import DscError
from dsc_hub.runs.run import Run, siblings


@dataclass(frozen=True)
class RunSummary:
    """One run folder.

    `state` is "running", "done", "evaluated", "stopped before STAGE" or "damaged: why"; `verdict` is that of the claim,
    "" without an evaluation. `differs` holds KEY=VALUE of the settings whose most frequent value among the recipe's
    runs is another one.
    """

    folder: Path
    recipe: str
    started_at: str
    state: str
    verdict: str
    differs: tuple[str, ...]
    bytes: int


def summaries(runs: Path, recipe: str | None = None) -> list[RunSummary]:
    """Return the runs below `runs`, or those of one recipe, newest first; none if there is no such folder."""
    names = [recipe] if recipe else sorted(p.name for p in runs.glob("*") if p.is_dir() and not p.is_symlink())
    return [summary for name in names for summary in _of_recipe(siblings(runs, name), name)]


def _of_recipe(runs: Sequence[Run], name: str) -> list[RunSummary]:
    facts = {run.folder: _facts(run) for run in runs}
    # The oldest first: of values that are as frequent, the first one counts as usual.
    facts = dict(sorted(facts.items(), key=lambda item: str(item[1].get("started_at", ""))))
    settings = {folder: dict(_flat(f.get("recipe") or {})) for folder, f in facts.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    usual = {k: Counter(json.dumps(each.get(k)) for each in settings.values()).most_common(1)[0][0] for k in keys}
    found = [
        RunSummary(
            folder=run.folder,
            recipe=name,
            started_at=str(facts[run.folder].get("started_at", "")),
            state=state_of(run),
            verdict=_verdict(run),
            differs=tuple(
                f"{k}={v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)}"
                for k in keys
                if (v := settings[run.folder].get(k)) is not None and json.dumps(v) != usual[k]
            ),
            bytes=size(run.folder),
        )
        for run in runs
    ]
    return sorted(found, key=lambda s: s.started_at, reverse=True)


def _facts(run: Run) -> dict[str, Any]:
    try:
        return run.raw_facts
    except DscError:
        return {}


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of all settings; a list is one value."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _verdict(run: Run) -> str:
    try:
        claim = (run.metrics.get("evaluation") or {}).get("claim") or {}
    except (DscError, AttributeError):
        return ""
    return str(claim.get("verdict", ""))


def is_running(run: Run) -> bool:
    """Return whether a process holds the folder's lock."""
    try:
        with run["lock"].open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock yet, or none of ours to open
        return False
    return False


def state_of(run: Run) -> str:
    """Return how far a run came, see RunSummary."""
    if is_running(run):
        return "running"
    try:
        publishes = (run.raw_facts.get("recipe") or {}).get("publish", {}).get("to") != "none"
        missing = [s for s in STAGES if run.marker(s.name) is None and (s.name != "publish" or publishes)]
    except (DscError, AttributeError) as e:
        return f"damaged: {getattr(e, 'message', 'run.json')}"
    if missing and run.marker("evaluation"):
        return "evaluated"
    return f"stopped before {missing[0].name}" if missing else "done"


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
