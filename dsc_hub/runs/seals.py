"""Hashes of what a finished stage wrote, in its marker: a change of it by anybody else is noticed."""

from __future__ import annotations

from collections.abc import Iterable

from dsc_hub.config.stages import BY_NAME
from dsc_hub.errors import RunError
from dsc_hub.runs.run import SEALS, Run


def changes(run: Run, stage: str) -> list[str]:
    """Return what has happened to the files of a finished stage since; nothing for one of a version without hashes."""
    recorded: dict[str, str] = (run.marker(stage) or {}).get(SEALS) or {}
    if not recorded:
        return []
    present = run.hashes(stage)
    # An earlier version may have hashed less: what it left out as a whole was not added.
    sealed = [n for n in BY_NAME[stage].sealed if any(_is_in(name, n) for name in recorded)]
    return [
        *(f"{name} is gone" for name in recorded if name not in present),
        *(f"{name} was changed" for name, value in recorded.items() if present.get(name, value) != value),
        *(f"{n} was added" for n in present if n not in recorded and any(_is_in(n, s) for s in sealed)),
    ]


def _is_in(name: str, sealed: str) -> bool:
    return name == sealed or name.startswith(f"{sealed}/")


def check(run: Run, stages: Iterable[str]) -> None:
    """RunError if a file of one of these finished stages is not as the stage left it."""
    for stage in stages:
        if found := changes(run, stage):
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise RunError(
                f"{run.folder}: {found[0]}{more} since the stage '{stage}' was done",
                f"Put it back. Or remove {run[f'{stage}.done.json']}: then the stage is done again, with what is left.",
            )
