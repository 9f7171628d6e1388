"""A run folder: append-only rows, finish markers, and what is left to do. The contract between stages.

    runs/<recipe>/<fingerprint>/
      run.json  prompts.jsonl  turns.jsonl  chains.jsonl  failed.jsonl  metrics.json  log.txt
      dataset/  adapter/  evaluation/  report.html  cards/  <stage>.done.json

Rows (rows.py) are lines that are written as they come. A marker is written last and whole: a stage without one is not done.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsc_hub.config.stages import STAGE_FILES
from dsc_hub.errors import ConfigError, RunError
from dsc_hub.runs import metrics_schema
from dsc_hub.runs.facts import facts_problems
from dsc_hub.runs.jsonl import ANEW, Rows
from dsc_hub.system.files import read_object, write_json


class Run:
    """One run folder. `run[name]` is the path of a file in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def rows(self, name: str) -> Rows:
        return Rows(self[name], self._way_out(name))

    def _way_out(self, name: str) -> str:
        """What to do about a damaged line of a file: which marker stands for the work that it holds."""
        if name.endswith("blind.jsonl"):
            return "Remove that line: a verdict less counts."
        for stage, names in STAGE_FILES.items():
            if name in names or name.split("/", maxsplit=1)[0] in names:
                marker = self[f"{stage}.done.json"]
                return f"Remove that line and {marker}, and run the recipe again: only what is missing is made anew."
        return ANEW

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json recorded at the start: recipe, identities, versions, hardware."""
        return read_object(self["run.json"])

    def add_facts(self, **facts: Any) -> None:
        old = self.facts if self["run.json"].is_file() else {}
        write_json(self["run.json"], old | facts)

    # -- finish markers

    def marker(self, stage: str) -> dict[str, Any] | None:
        path = self[f"{stage}.done.json"]
        return read_object(path) if path.is_file() else None

    def is_done(self, stage: str, fingerprint: str) -> bool:
        """Is there a marker of this very work, and is what it speaks of still there?"""
        marker = self.marker(stage)
        here = all(self[name].exists() for name in STAGE_FILES.get(stage, ())[:1])
        return marker is not None and marker.get("fingerprint") == fingerprint and here

    def finish(self, stage: str, fingerprint: str, seconds: float, result: Mapping[str, Any]) -> None:
        """Write the stage's marker: the last thing a stage does."""
        write_json(
            self[f"{stage}.done.json"],
            {
                "stage": stage,
                "fingerprint": fingerprint,
                "seconds": round(seconds, 2),
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **result,
            },
        )

    def unfinish(self, stage: str) -> None:
        self[f"{stage}.done.json"].unlink(missing_ok=True)

    # -- numbers

    @property
    def metrics(self) -> dict[str, Any]:
        """What metrics.json holds, of today's schema: numbers of the one before are upgraded. Unchecked (`evaluated`
        checks)."""
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
        # Of the schema that is written now: what older sections lack of it is told when they are read (`evaluated`).
        write_json(self["metrics.json"], self.metrics | {"schema": metrics_schema.SCHEMA, section: dict(found)})

    def drop_metrics(self, section: str) -> None:
        """Take out numbers that no longer hold."""
        if section in (metrics := self.metrics):
            write_json(self["metrics.json"], {k: v for k, v in metrics.items() if k != section})

    # -- what it cost, over all the sessions that a run took

    def note_session(self, stage: str, cost: Mapping[str, Any]) -> None:
        """Add what a session cost: {seconds, new_tokens}, and what else is known of {reused_tokens, cached_tokens,
        looked_up_tokens, retries, scoring_s, processors, kind}."""
        rows = self.rows("sessions.jsonl")
        rows.append({"stage": stage, **cost})
        rows.close()

    def cost(self, stage: str, turns: str) -> dict[str, Any]:
        """Tokens of all turns, and of all sessions together: seconds, new tokens a second, the share of prompt tokens that was
        found in the servers' prefix caches, processor hours, requests sent again by reason.

        A session that was killed left its turns but not its seconds: then `seconds` and `processor_hours` are None, and the
        rest is that of the sessions that ended. None, too, what no session knows.
        """
        asked, new = 0, 0
        for row in self.rows(turns):
            asked, new = asked + row["prompt_tokens"], new + row["new_tokens"]
        sessions = [row for row in self.rows("sessions.jsonl") if row["stage"] == stage]

        def total(key: str) -> float:
            return sum(row.get(key) or 0 for row in sessions)

        seconds, known, looked_up = total("seconds"), total("new_tokens"), total("looked_up_tokens")
        ended = bool(sessions) and known + total("reused_tokens") >= new  # more, where merged shards had some in common
        hours = [row["seconds"] * row["processors"] / 3600 for row in sessions if row.get("processors")]
        retries: Counter[str] = Counter()
        for row in sessions:
            retries.update(row.get("retries") or {})
        return {
            "prompt_tokens": asked,
            "new_tokens": new,
            "seconds": round(seconds, 1) if ended else None,
            "tokens_per_s": round(known / seconds, 1) if seconds and known else None,
            "cache_rate": round(total("cached_tokens") / looked_up, 4) if looked_up else None,
            "processor_hours": round(sum(hours), 4) if ended and len(hours) == len(sessions) else None,
            "processors": next((row["kind"] for row in sessions if row.get("kind")), None),
            "scoring_s": round(total("scoring_s"), 1) if sessions else None,
            "retries": dict(retries.most_common()),
        }

    # -- one process at a time

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; RunError if another process does. The kernel lets go when a process dies."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self["lock"].open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.folder} is in use by another process",
                    "Wait for it, or end it; two runs would write over each other.",
                ) from None
            yield

    # -- what another run has done already

    def take_over(self, stage: str, fingerprint: str, before: Iterable[str], siblings: Iterable[Run]) -> Path | None:
        """Copy a stage's files and marker from a sibling that finished the same work; the donor's folder, or None.

        Only from one whose stages `before` are the very ones this run has (equal markers): the evaluation of an adapter
        must not come to stand beside another adapter that was trained by the same recipe. Copies, not links: rows of a
        taken-over file may be appended to here without changing the donor.
        """
        donor = self.donor(stage, fingerprint, dict.fromkeys(before, self), siblings)
        if donor is None:
            return None
        for name in STAGE_FILES[stage]:
            target = self[name]
            shutil.rmtree(target, ignore_errors=True)
            if donor[name].is_dir():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(donor[name], target)
        self.copy_files(donor, STAGE_FILES[stage])
        for name in (stage, *({"evaluation": ["test_set", "blind"]}.get(stage, []))):
            if (section := donor.metrics.get(name)) is not None:
                self.add_metrics(name, section)
            else:
                self.drop_metrics(name)
        shutil.copy2(donor[f"{stage}.done.json"], self[f"{stage}.done.json"])
        return donor.folder

    def donor(self, stage: str, fingerprint: str, before: Mapping[str, Run], siblings: Iterable[Run]) -> Run | None:
        """The sibling that a stage can be taken over from (`take_over`); `before`: the stages before it, and whose work each is or
        will be. None if there is none. Changes nothing."""
        if stage == "evaluation" and self["evaluation/blind.jsonl"].is_file():
            return None  # what people judged lies in that folder, and can't be made again
        for donor in siblings:
            if donor.folder == self.folder or not donor.is_done(stage, fingerprint):
                continue
            if any(donor.marker(b) != of.marker(b) for b, of in before.items()):
                continue
            # Report and cards tell what people judged, which belongs to no stage.
            if "evaluation" in before and donor.metrics.get("blind") != before["evaluation"].metrics.get("blind"):
                continue
            if any(donor[name].exists() for name in STAGE_FILES.get(stage, ())):
                return donor
        return None

    def outlook(
        self, stages: Sequence[str], fingerprints: Mapping[str, str], siblings: Sequence[Run]
    ) -> dict[str, Run]:
        """What a run would not have to do: the stages from the first on that are done here (their value is this run) or that would be
        taken over (the donor), up to the first one that is neither."""
        out: dict[str, Run] = {}
        for stage in stages:
            ours = all(of is self for of in out.values())  # what is taken over ends what was made here after it
            found = self if ours and self.is_done(stage, fingerprints[stage]) else None
            found = found or self.donor(stage, fingerprints[stage], out, siblings)
            if found is None:
                break
            out[stage] = found
        return out

    def adopt_rows(self, stage: str, fingerprint: str, siblings: Iterable[Run]) -> Path | None:
        """Copy the rows of a sibling that began the same stage and didn't finish it, if we have none; its folder, or None.

        A recipe that is changed further down while it samples goes on from what is there.
        """
        names = STAGE_FILES[stage]
        if any(self[name].exists() for name in names):
            return None
        for donor in siblings:
            same = donor.facts.get("fingerprints", {}).get(stage) == fingerprint
            if donor.folder != self.folder and same and donor["turns.jsonl"].is_file():
                self.copy_files(donor, names)  # they may be written to this moment: a torn last line is cut off later
                return donor.folder
        return None

    def copy_files(self, donor: Run, names: Sequence[str]) -> None:
        """What of these are files, whole or not at all; the first one is the last to be there. (A chain without its turns would
        pass for one that needs none.)"""
        there = [name for name in names if donor[name].is_file()]
        for name in there:  # in this order: a donor that still writes has the turns of its chains on disk
            shutil.copy2(donor[name], self[f"{name}.part"])
        for name in reversed(there):
            os.replace(self[f"{name}.part"], self[name])


def siblings(runs: Path, recipe_name: str) -> list[Run]:
    """All runs of a recipe under `runs`, the newest first."""
    folders = [p for p in (runs / recipe_name).glob("*") if (p / "run.json").is_file()]
    return [Run(p) for p in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)]


def find(reference: str, runs: Path) -> Run:
    """The run that the user means: a run folder, or a recipe's name or the folder of its runs (its newest run under `runs`, or
    in there, an evaluated one if there is one). ConfigError if none."""
    folder = Path(reference)
    if (folder / "run.json").is_file():
        return _readable(Run(folder))
    if found := siblings(runs, reference) or siblings(
        folder.parent, folder.name
    ):  # by its start: a look at an old run may write into it
        done = [run for run in found if run.marker("evaluation")]  # not a variant that was broken off
        return _readable(max(done or found, key=lambda run: str(run.facts.get("started_at", ""))))
    there = sorted(p.name for p in runs.glob("*") if siblings(runs, p.name)) if runs.is_dir() else []
    raise ConfigError(
        f"'{reference}' is neither a run folder (no run.json in it) nor a recipe with a run under {runs}",
        f"Runs of these recipes are there: {', '.join(there)}." if there else "`dsc run RECIPE` makes one.",
    )


def _readable(run: Run) -> Run:
    """The run, if its run.json holds what is needed to look at it."""
    if problems := facts_problems(run.facts):
        raise RunError(
            f"{run['run.json']} is damaged: {'; '.join(problems[:3])}",
            "Move the whole run folder away and run the recipe again.",
        )
    return run
