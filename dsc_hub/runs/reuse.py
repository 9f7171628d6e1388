"""What another run of the recipe has done already, and how a run gets it: stages whole, or rows of one that was begun."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsc_hub.config.stages import BY_NAME
from dsc_hub.runs.run import Run


def reuse(run: Run, stage: str, fingerprint: str, before: Iterable[str], siblings: Iterable[Run]) -> Path | None:
    """Copy a stage's files and marker from a sibling that finished the same work; the donor's folder, or None.

    Only from one whose stages `before` are the very ones this run has (equal markers): the evaluation of an adapter
    must not come to stand beside another adapter that was trained by the same recipe. Copies, not links: rows of a
    taken-over file may be appended to here without changing the donor.
    """
    donor = find_reusable(run, stage, fingerprint, dict.fromkeys(before, run), siblings)
    if donor is None:
        return None
    for name in BY_NAME[stage].files:
        target = run[name]
        shutil.rmtree(target, ignore_errors=True)
        if donor[name].is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(donor[name], target)
    copy_files(run, donor, BY_NAME[stage].files)
    for name in BY_NAME[stage].sections:
        if (section := donor.metrics.get(name)) is not None:
            run.add_metrics(name, section)
        else:
            run.drop_metrics(name)
    shutil.copy2(donor[f"{stage}.done.json"], run[f"{stage}.done.json"])
    return donor.folder


def find_reusable(
    run: Run, stage: str, fingerprint: str, before: Mapping[str, Run], siblings: Iterable[Run]
) -> Run | None:
    """The sibling that a stage can be taken over from (`reuse`); `before`: the stages before it, and whose work each is or
    will be. None if there is none. Changes nothing."""
    if stage == "evaluation" and run["evaluation/blind.jsonl"].is_file():
        return None  # what people judged lies in that folder, and can't be made again
    for donor in siblings:
        if donor.folder == run.folder or not donor.is_done(stage, fingerprint):
            continue
        if any(donor.marker(b) != of.marker(b) for b, of in before.items()):
            continue
        # Report and cards tell what people judged, which belongs to no stage.
        if "evaluation" in before and donor.metrics.get("blind") != before["evaluation"].metrics.get("blind"):
            continue
        if any(donor[name].exists() for name in BY_NAME[stage].files):
            return donor
    return None


def reusable_stages(
    run: Run, stages: Sequence[str], fingerprints: Mapping[str, str], siblings: Sequence[Run]
) -> dict[str, Run]:
    """What a run would not have to do: the stages from the first on that are done here (their value is this run) or that would be
    taken over (the donor), up to the first one that is neither."""
    out: dict[str, Run] = {}
    for stage in stages:
        ours = all(of is run for of in out.values())  # what is taken over ends what was made here after it
        found = run if ours and run.is_done(stage, fingerprints[stage]) else None
        found = found or find_reusable(run, stage, fingerprints[stage], out, siblings)
        if found is None:
            break
        out[stage] = found
    return out


def adopt_rows(run: Run, stage: str, fingerprint: str, siblings: Iterable[Run]) -> Path | None:
    """Copy the rows of a sibling that began the same stage and didn't finish it, if we have none; its folder, or None.

    A recipe that is changed further down while it samples goes on from what is there.
    """
    names = BY_NAME[stage].files
    if any(run[name].exists() for name in names):
        return None
    for donor in siblings:
        same = donor.facts.get("fingerprints", {}).get(stage) == fingerprint
        if donor.folder != run.folder and same and donor["turns.jsonl"].is_file():
            copy_files(run, donor, names)  # they may be written to this moment: a torn last line is cut off later
            return donor.folder
    return None


def copy_files(run: Run, donor: Run, names: Sequence[str]) -> None:
    """What of these are files, whole or not at all; the first one is the last to be there. (A chain without its turns would
    pass for one that needs none.)"""
    there = [name for name in names if donor[name].is_file()]
    for name in there:  # in this order: a donor that still writes has the turns of its chains on disk
        shutil.copy2(donor[name], run[f"{name}.part"])
    for name in reversed(there):
        os.replace(run[f"{name}.part"], run[name])
