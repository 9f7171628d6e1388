"""Reuse of the work of another run of the recipe: finished stages, or the rows of an unfinished one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsc_hub.config.stages import BY_NAME
from dsc_hub.errors import DscError
from dsc_hub.runs.metrics_schema import SCHEMA
from dsc_hub.runs.run import Run
from dsc_hub.runs.seals import changes


def reuse(run: Run, stage: str, fingerprint: str, before: Iterable[str], siblings: Iterable[Run]) -> Path | None:
    """Copy a stage's files, metrics and marker from a sibling run that finished the same work.

    Return the folder of the source run, or None if no sibling qualifies. The markers of the stages `before` must be
    equal in both runs: otherwise the evaluation of one adapter could be stored beside another adapter that was trained
    with the same recipe. Files are copied, not linked, so that rows appended here do not change the source run.
    """
    source = find_reusable(run, stage, fingerprint, dict.fromkeys(before, run), siblings)
    if source is None:
        return None
    for name in BY_NAME[stage].files:
        target = run[name]
        shutil.rmtree(target, ignore_errors=True)
        if source[name].is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source[name], target)
    copy_files(run, source, BY_NAME[stage].files)
    for name in BY_NAME[stage].sections:
        if (section := source.metrics.get(name)) is not None:
            run.add_metrics(name, section)
        else:
            run.drop_metrics(name)
    shutil.copy2(source[f"{stage}.done.json"], run[f"{stage}.done.json"])
    return source.folder


def _has_readable_numbers(source: Run) -> bool:
    """Return whether metrics.json is of this schema: else the stage's numbers would be lost on the way."""
    try:
        return source.metrics.get("schema") == SCHEMA
    except DscError:
        return False


def find_reusable(
    run: Run, stage: str, fingerprint: str, before: Mapping[str, Run], siblings: Iterable[Run]
) -> Run | None:
    """Return the sibling run whose result of the stage is reusable (see `reuse`), or None. Changes no files.

    `before` maps each earlier stage to the run that its result comes from, or will come from.
    """
    if stage == "evaluation" and run["evaluation/blind.jsonl"].is_file():
        return None  # the folder holds human verdicts, which cannot be recomputed
    for source in siblings:
        if source.folder == run.folder or not source.is_done(stage, fingerprint) or changes(source, stage):
            continue
        if any(source.marker(b) != owner.marker(b) for b, owner in before.items()):
            continue
        # Report and cards include the human verdicts, which belong to no stage.
        if "evaluation" in before and source.metrics.get("blind") != before["evaluation"].metrics.get("blind"):
            continue
        if any(source[name].exists() for name in BY_NAME[stage].files) and _has_readable_numbers(source):
            return source
    return None


def reusable_stages(
    run: Run, stages: Sequence[str], fingerprints: Mapping[str, str], siblings: Sequence[Run]
) -> dict[str, Run]:
    """Return the leading stages that need no work, each with the run that its result comes from.

    The value is `run` itself for a stage that is done there, or the source run for a reusable stage. The mapping ends
    before the first stage that is neither.
    """
    out: dict[str, Run] = {}
    for stage in stages:
        is_local = all(owner is run for owner in out.values())  # a reused stage makes this run's own later stages stale
        source = run if is_local and run.is_done(stage, fingerprints[stage]) else None
        source = source or find_reusable(run, stage, fingerprints[stage], out, siblings)
        if source is None:
            break
        out[stage] = source
    return out


def adopt_rows(run: Run, stage: str, fingerprint: str, siblings: Iterable[Run]) -> Path | None:
    """Copy the rows of a sibling run that started the same stage, if this run has none.

    Return the sibling's folder, or None. If later sections of a recipe are edited during sampling, the new run
    continues from the existing rows.
    """
    source = find_adoptable(run, stage, fingerprint, siblings)
    if source is None:
        return None
    # The sibling may still be writing: a torn last line is truncated later.
    copy_files(run, source, BY_NAME[stage].files)
    return source.folder


def find_adoptable(run: Run, stage: str, fingerprint: str, siblings: Iterable[Run]) -> Run | None:
    """Return the sibling run whose rows `adopt_rows` copies, or None. Changes no files."""
    if any(run[name].exists() for name in BY_NAME[stage].files):
        return None
    for source in siblings:
        same = source.raw_facts.get("fingerprints", {}).get(stage) == fingerprint
        if source.folder != run.folder and same and source["turns.jsonl"].is_file():
            return source
    return None


def copy_files(run: Run, source: Run, names: Sequence[str]) -> None:
    """Copy those of `names` that are files in `source`, each atomically; the first name appears last.

    (A chain without its turns would look like one that needs none.)
    """
    existing = [name for name in names if source[name].is_file()]
    # In this order: a source run that is still writing has stored the turns of every chain that is copied first.
    for name in existing:
        shutil.copy2(source[name], run[f"{name}.part"])
    for name in reversed(existing):
        os.replace(run[f"{name}.part"], run[name])
