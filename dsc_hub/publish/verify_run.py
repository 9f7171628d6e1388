"""`dsc verify RUN`: the files of a run folder against the hashes that its stages recorded."""

from __future__ import annotations

from dsc_hub.config.stages import STAGES
from dsc_hub.publish.numbers import SHOWN_DIFFERENCES
from dsc_hub.publish.verify import Check
from dsc_hub.runs import seals
from dsc_hub.runs.run import SEALS, Run


def verify_run(run: Run) -> list[Check]:
    """Check that the files of each finished stage of a run folder are as the stage left them."""
    out = []
    for stage in (s.name for s in STAGES if s.sealed):
        marker = run.marker(stage)
        if marker is None or not marker.get(SEALS):
            why = "not done" if marker is None else "done by a version that recorded no hashes"
            out.append(Check(stage, None, why))
            continue
        found, listed = seals.changes(run, stage), marker[SEALS]
        detail = "; ".join(found[:SHOWN_DIFFERENCES]) or f"{len(listed)} files have the hash that the stage recorded"
        out.append(Check(stage, not found, detail))
    others = "run.json, report and cards: run.json gets more facts, the others are made anew from what was checked"
    return [*out, Check("the rest", None, f"not hashed are {others}")]
