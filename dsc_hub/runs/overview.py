"""What the run folders below `runs` are: what differs between them, how far they came, their verdict and size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.config.stages import STAGES
from dsc_hub.errors import DscError
from dsc_hub.runs.run import Run, siblings
from dsc_hub.system.files import folder_bytes


@dataclass(frozen=True)
class RunSummary:
    """One run folder.

    `state` is "running" (on this machine), "done", "evaluated", "stopped at STAGE" or "damaged: why"; `verdict` is
    that of the claim, "" without an evaluation. `differs` holds KEY=VALUE of the settings whose most frequent value
    among the recipe's runs is another one.
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
    settings = {folder: flat_settings(_recipe(f)) for folder, f in facts.items()}
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    usual = {k: Counter(json.dumps(e[k]) for e in settings.values() if k in e).most_common(1)[0][0] for k in keys}
    summaries = [
        RunSummary(
            folder=run.folder,
            recipe=name,
            started_at=str(facts[run.folder].get("started_at", "")),
            state=state_of(run),
            verdict=_verdict(run),
            differs=tuple(shown_setting(k, v) for k, v in settings[run.folder].items() if json.dumps(v) != usual[k]),
            bytes=folder_bytes(run.folder),
        )
        for run in runs
    ]
    return sorted(summaries, key=lambda s: s.started_at, reverse=True)


def _facts(run: Run) -> dict[str, Any]:
    try:
        return run.raw_facts
    except DscError:
        return {}


def _recipe(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    recipe = facts.get("recipe")
    return recipe if isinstance(recipe, Mapping) else {}


def flat_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a recipe by their dotted keys; a list is one value."""
    return dict(_flat(recipe))


def _flat(section: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def shown_setting(key: str, value: Any) -> str:
    """Return KEY=VALUE as one would write it behind a command."""
    return f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"


def _verdict(run: Run) -> str:
    try:
        claim = (run.metrics.get("evaluation") or {}).get("claim") or {}
    except (DscError, AttributeError):
        return ""
    return str(claim.get("verdict", ""))


def is_running(run: Run) -> bool:
    """Return whether a process of this machine holds the folder's lock; looked up without taking it."""
    try:
        nodes = {str(path.stat().st_ino) for path in (run["lock"], run.folder)}
        held = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:  # no lock yet, or no such list
        return False
    return any(line.split()[-3].rpartition(":")[2] in nodes and "FLOCK" in line for line in held if "->" not in line)


def state_of(run: Run) -> str:
    """Return how far a run came, see RunSummary."""
    if is_running(run):
        return "running"
    try:
        _ = run.metrics
        publishes = dict(_flat(_recipe(run.raw_facts))).get("publish.to") != "none"
        missing = [s for s in STAGES if run.marker(s.name) is None and (s.name != "publish" or publishes)]
    except (DscError, AttributeError) as e:
        return f"damaged: {getattr(e, 'message', 'run.json')}"
    if missing and run.marker("evaluation"):
        return "evaluated"
    return f"stopped at {missing[0].name}" if missing else "done"
