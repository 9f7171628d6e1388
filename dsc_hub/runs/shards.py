"""Sampling on n machines: which chains are whose, and one run folder out of their folders.

    runs/<recipe>/<fingerprint>/shards/<i>-of-<n>/      a run folder for each shard, with prompts and sampling

Whose a prompt is depends on its id alone, so shards can be sampled in any order, at once, and again. They lie inside the run
folder, not beside it: no other run may take a shard for the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.errors import ConfigError, RunError
from dsc_hub.records import word
from dsc_hub.runs.row_index import KeyOf, RowIndex, chain_key, turn_key
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_lines
from dsc_hub.system.hashing import digest

FOLDER = "shards"
MOST = 10_000


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Share `number` (from 1) of `of` shares."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, prompt_id: str) -> bool:
        """Is this prompt, with all its chains, in this shard? (An id is a hash, so the shards are alike.)"""
        return word(prompt_id) % self.of == self.number - 1

    def fingerprint(self, sampling: str) -> str:
        """Of this shard's sampling: never equal to that of the whole."""
        return digest(sampling, "shard", self.number, self.of)

    def folder(self, run: Run) -> Path:
        return run[f"{FOLDER}/{self.number}-of-{self.of}"]


def parse(text: str) -> Shard:
    """`2/8` -> the second of eight shards; ConfigError if it is none."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    shard = Shard(int(found[1]), int(found[2])) if found else Shard(0, 0)
    if not 1 <= shard.number <= shard.of <= MOST:
        raise ConfigError(
            f"--shard {text}: expected i/n with 1 <= i <= n <= {MOST}",
            "For the second of eight machines: --shard 2/8.",
        )
    return shard


def are_waiting(run: Run) -> bool:
    """Were shards of this run sampled that are in no run yet?"""
    return any(run[FOLDER].glob("*-of-*/run.json")) and not run["chains.jsonl"].exists()


def find(run: Run, folders: Sequence[Path], sampling: str, again: str) -> list[Run]:
    """The shards to merge, checked, in their order: those in `folders`, or those in the run folder. `sampling` is the whole's
    fingerprint, `again` the command that samples it.

    One RunError with all that is wrong: none there, of several divisions, of other work, unfinished, twice, missing.
    """
    runs = [Run(folder) for folder in folders or sorted(p.parent for p in run[FOLDER].glob("*/run.json"))]
    if not runs:
        raise RunError(
            f"there are no shards in {run[FOLDER]}",
            f"Sample them with `{again} --shard 1/N` to N/N, and bring their folders there or name them.",
        )
    problems, found = [], dict[Shard, Run]()
    for of in runs:
        shard = _shard_of(of)
        if shard is None:
            problems.append(f"{of.folder} is no shard: no run.json there names one")
        elif shard in found:
            problems.append(f"shard {shard} is there twice: {found[shard].folder}, {of.folder}")
        else:
            found[shard] = of
            problems += _wrong(shard, of, sampling, again)
    for n in (divisions := sorted({shard.of for shard in found})):
        if missing := [str(i) for i in range(1, n + 1) if Shard(i, n) not in found]:
            told = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            problems.append(f"of {n} shards {len(missing)} missing: {told}; sample each with `{again} --shard i/{n}`")
    if len(divisions) > 1:
        problems.append(f"these are shards of several divisions (of {', of '.join(map(str, divisions))}): name one's")
    if problems:
        raise RunError("; ".join(problems), "Name the folders that are meant: dsc merge RECIPE FOLDER ...")
    return [found[shard] for shard in sorted(found)]


def _shard_of(run: Run) -> Shard | None:
    match run.facts.get("shard") if run["run.json"].is_file() else None:
        case {"number": int(number), "of": int(of)}:
            return Shard(number, of)
    return None


def _wrong(shard: Shard, run: Run, sampling: str, again: str) -> list[str]:
    expected = shard.fingerprint(sampling)
    if (recorded := run.facts.get("fingerprints", {}).get("sampling")) != expected:
        return [
            f"{run.folder} is shard {shard} of something else (its sampling is {recorded}, expected {expected}): recipe, overrides, "
            "prompts, model and scorers must be the same"
        ]
    if not run.is_done("sampling", expected):
        return [f"shard {shard} in {run.folder} is not finished: `{again} --shard {shard}` goes on from what is there"]
    return []


def join(run: Run, shards: Iterable[Run]) -> None:
    """Write the rows of the run folder: those of its shards, and what it had itself, each once, in the order of their keys. Every
    file is written whole: a merge that is killed can be made again."""
    sources = [run, *shards]

    def index(name: str, key: KeyOf) -> RowIndex:
        return RowIndex([of.rows(name) for of in sources], key)

    chains = index("chains.jsonl", chain_key)
    rows = {
        "turns.jsonl": index("turns.jsonl", turn_key),
        "failed.jsonl": index("failed.jsonl", lambda row: None if chain_key(row) in chains else chain_key(row)),
        "chains.jsonl": chains,
    }
    for name, of in rows.items():
        write_lines(run[name], of.lines())
    # What the run itself spent, and not again what an earlier merge brought.
    sessions = [row for row in run.rows("sessions.jsonl") if "shard" not in row]
    for of in shards:
        sessions += [row | {"shard": str(_shard_of(of))} for row in of.rows("sessions.jsonl")]
    write_lines(run["sessions.jsonl"], [json.dumps(row).encode() + b"\n" for row in sessions])
