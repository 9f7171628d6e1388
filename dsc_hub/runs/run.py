"""A run folder: append-only rows, facts, numbers and finish markers. The contract between stages.

    runs/<recipe>/<fingerprint>/
      run.json  prompts.jsonl  turns.jsonl  chains.jsonl  failed.jsonl  metrics.json  log.txt
      dataset/  adapter/  evaluation/  report.html  cards/  <stage>.done.json

Rows (jsonl.py) are appended line by line. A marker is written last and atomically: a stage without a marker is not
done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsc_hub.config.stages import BY_NAME, STAGES
from dsc_hub.errors import RunError
from dsc_hub.runs import metrics_schema
from dsc_hub.runs.facts import RunFacts, parse_facts
from dsc_hub.runs.jsonl import RERUN, JsonlFile
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.hashing import digest, file_hash
from dsc_hub.system.locks import locked_folder

COMES_LATER = ("blind",)  # files of human verdicts, beside those of the evaluation
SEALS = "files"  # in a marker: hashes of what its stage wrote


class Run:
    """One run folder. `run[name]` is the path of a file in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def rows(self, name: str) -> JsonlFile:
        return JsonlFile(self[name], self._hint(name))

    def _hint(self, name: str) -> str:
        """Return the hint for a damaged line of a file: which stage marker to remove."""
        if name.endswith("blind.jsonl"):
            return "Remove that line: a verdict less counts."
        for stage in STAGES:
            if name in stage.files or name.split("/", maxsplit=1)[0] in stage.files:
                marker = self[f"{stage.name}.done.json"]
                return f"Remove that line and {marker}, and run the recipe again: only what is missing is made anew."
        return RERUN

    @property
    def facts(self) -> RunFacts:
        """run.json, recorded at the start: recipe, identities, versions, hardware. RunError if it is damaged."""
        return parse_facts(self.raw_facts, self["run.json"])

    @property
    def raw_facts(self) -> dict[str, Any]:
        """The JSON object of run.json, not validated."""
        return read_object(self["run.json"])

    def add_facts(self, **facts: Any) -> None:
        old = self.raw_facts if self["run.json"].is_file() else {}
        write_json(self["run.json"], old | facts)

    # -- finish markers

    def marker(self, stage: str) -> dict[str, Any] | None:
        """Return what a finished stage recorded; None if it is not finished. RunError if that is damaged."""
        path = self[f"{stage}.done.json"]
        if not path.is_file():
            return None
        marker = read_object(path)
        hashes = marker.get(SEALS) or {}
        are_hashes = isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
        if not are_hashes or not isinstance(marker.get("result", {}), dict):
            raise RunError(
                f"{path} is damaged: expected an object for 'result', and hashes in '{SEALS}'",
                "Remove it: the stage is done again, with what is left.",
            )
        return marker

    def result(self, stage: str) -> dict[str, Any]:
        """Return what a finished stage recorded in its marker; RunError if the stage is not finished."""
        marker = self.marker(stage)
        if marker is None:
            raise self.not_done(stage)
        return dict(marker["result"])

    def not_done(self, stage: str) -> RunError:
        """Return the error for work that needs a stage which is not done."""
        return RunError(
            f"the stage '{stage}' of {self.folder} is not done",
            f"Run `dsc {BY_NAME[stage].command}` first, or `dsc run` for all of it.",
        )

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Return whether the stage has a marker with this fingerprint and its first file exists."""
        marker = self.marker(stage)
        exists = all(self[name].exists() for name in BY_NAME[stage].files[:1])
        return marker is not None and marker.get("fingerprint") == fingerprint and exists

    def finish(self, stage: str, fingerprint: str, seconds: float, result: Mapping[str, Any]) -> None:
        """Write the stage's marker, with the hashes of what it wrote; the last action of a stage."""
        write_json(
            self[f"{stage}.done.json"],
            {
                "stage": stage,
                "fingerprint": fingerprint,
                "seconds": round(seconds, 2),
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **result,
                SEALS: self.hashes(stage),
            },
        )

    def hashes(self, stage: str) -> dict[str, str]:
        """Return the SHA-256 of each file that is final once the stage is done, by its path in the run folder."""
        present = [self[name] for name in BY_NAME[stage].sealed if self[name].exists()]
        files = [file for path in present for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
        files = [file for file in files if file.is_file() and not file.name.startswith(COMES_LATER)]
        return {str(file.relative_to(self.folder)): file_hash(file) for file in files} | self._hash_of_numbers(stage)

    def _hash_of_numbers(self, stage: str) -> dict[str, str]:
        """Return the hash of a stage's own section of metrics.json; none if it can't be read."""
        name = next(iter(BY_NAME[stage].sections), "")
        try:
            numbers = read_object(self["metrics.json"])
        except RunError:
            return {}
        return {f"metrics.json, {name}": digest(numbers[name])} if BY_NAME[stage].sealed and name in numbers else {}

    def unfinish(self, stage: str) -> None:
        self[f"{stage}.done.json"].unlink(missing_ok=True)

    # -- numbers

    @property
    def metrics(self) -> dict[str, Any]:
        """Contents of metrics.json, not validated (see `evaluated`); a file of the previous schema is upgraded."""
        if not self["metrics.json"].is_file():
            return {"schema": metrics_schema.SCHEMA}
        metrics = read_object(self["metrics.json"])
        if metrics.get("schema") != metrics_schema.SCHEMA - 1:
            return metrics
        from dsc_hub.runs.upgrade import upgrade

        try:
            return upgrade(metrics)
        except (LookupError, TypeError, ValueError, AttributeError):
            return metrics  # damaged: `evaluated` says so

    def add_metrics(self, section: str, found: Mapping[str, Any]) -> None:
        # Written with the current schema number; `evaluated` reports what older sections lack.
        write_json(self["metrics.json"], self.metrics | {"schema": metrics_schema.SCHEMA, section: dict(found)})

    def drop_metrics(self, section: str) -> None:
        """Remove a section whose numbers no longer hold."""
        if section in (metrics := self.metrics):
            write_json(self["metrics.json"], {k: v for k, v in metrics.items() if k != section})

    # -- one process at a time

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder; RunError if another process holds the lock. The kernel releases it when a process dies."""

        def refuse(holder: str) -> None:
            by = holder or "another process"
            raise RunError(
                f"{self.folder} is in use by {by}",
                "Wait for it, or end it; two runs would write over each other."
                + (" If it is gone, remove that file." if holder else ""),
            )

        with locked_folder(self.folder, "lock", refuse):
            yield


def siblings(runs: Path, recipe_name: str) -> list[Run]:
    """Return all runs of a recipe under `runs`, newest first."""
    folders = [p for p in (runs / recipe_name).glob("*") if (p / "run.json").is_file()]
    return [Run(p) for p in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)]
