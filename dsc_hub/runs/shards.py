"""Sampling on n machines: assignment of chains to shards, and merging of the shards into one run folder.

    runs/<recipe>/<fingerprint>/shards/<i>-of-<n>/      a run folder for each shard, with prompts and sampling

A prompt's shard depends on its id alone, so shards can be sampled in any order, in parallel, and repeatedly. They lie
inside the run folder, not beside it, so that no other run mistakes a shard for the whole run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.errors import ConfigError, RunError
from dsc_hub.records import id_as_uint64
from dsc_hub.runs.row_index import KeyOf, RowIndex, chain_key, turn_key
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_lines
from dsc_hub.system.hashing import digest

FOLDER = "shards"
MOST_SHARDS = 10_000


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Shard `number` (from 1) of `of` shards."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def has(self, prompt_id: str) -> bool:
        """Return whether this prompt, with all its chains, is in this shard. Ids are hashes, so shards are alike."""
        return id_as_uint64(prompt_id) % self.of == self.number - 1

    def fingerprint(self, sampling: str) -> str:
        """Return the fingerprint of this shard's sampling; it differs from the whole run's."""
        return digest(sampling, "shard", self.number, self.of)

    def folder(self, run: Run) -> Path:
        return run[f"{FOLDER}/{self.number}-of-{self.of}"]


def parse(text: str) -> Shard:
    """Parse `2/8` as the second of eight shards; ConfigError if the text is no valid shard."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    shard = Shard(int(match[1]), int(match[2])) if match else Shard(0, 0)
    if not 1 <= shard.number <= shard.of <= MOST_SHARDS:
        raise ConfigError(
            f"--shard {text}: expected i/n with 1 <= i <= n <= {MOST_SHARDS}",
            "For the second of eight machines: --shard 2/8.",
        )
    return shard


def are_waiting(run: Run) -> bool:
    """Return whether shards of this run were sampled but not merged yet."""
    return any(run[FOLDER].glob("*-of-*/run.json")) and not run["chains.jsonl"].exists()


def find_shards(run: Run, folders: Sequence[Path], sampling: str, again: str) -> list[Run]:
    """Return the shards to merge, checked and in order: those in `folders`, or else those in the run folder.

    `sampling` is the whole run's sampling fingerprint, `again` the command that samples it. One RunError lists all
    problems: no shards, several divisions, a different fingerprint, unfinished, duplicate or missing shards.
    """
    runs = [Run(folder) for folder in folders or sorted(p.parent for p in run[FOLDER].glob("*/run.json"))]
    if not runs:
        raise RunError(
            f"there are no shards in {run[FOLDER]}",
            f"Sample them with `{again} --shard 1/N` to N/N, and bring their folders there or name them.",
        )
    problems, by_shard = [], dict[Shard, Run]()
    for candidate in runs:
        shard = _shard_of(candidate)
        if shard is None:
            problems.append(f"{candidate.folder} is no shard: no run.json there names one")
        elif shard in by_shard:
            problems.append(f"shard {shard} is there twice: {by_shard[shard].folder}, {candidate.folder}")
        else:
            by_shard[shard] = candidate
            problems += _wrong(shard, candidate, sampling, again)
    for n in (divisions := sorted({shard.of for shard in by_shard})):
        if missing := [str(i) for i in range(1, n + 1) if Shard(i, n) not in by_shard]:
            numbers = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            problems.append(
                f"of {n} shards {len(missing)} missing: {numbers}; sample each with `{again} --shard i/{n}`"
            )
    if len(divisions) > 1:
        problems.append(f"these are shards of several divisions (of {', of '.join(map(str, divisions))}): name one's")
    if problems:
        raise RunError("; ".join(problems), "Name the folders that are meant: dsc merge RECIPE FOLDER ...")
    return [by_shard[shard] for shard in sorted(by_shard)]


def _shard_of(run: Run) -> Shard | None:
    match run.raw_facts.get("shard") if run["run.json"].is_file() else None:
        case {"number": int(number), "of": int(count)}:
            return Shard(number, count)
    return None


def _wrong(shard: Shard, run: Run, sampling: str, again: str) -> list[str]:
    expected = shard.fingerprint(sampling)
    if (recorded := run.raw_facts.get("fingerprints", {}).get("sampling")) != expected:
        return [
            f"{run.folder} is shard {shard} of something else (its sampling is {recorded}, expected {expected}): "
            "recipe, overrides, prompts, model and scorers must be the same"
        ]
    if not run.is_done("sampling", expected):
        return [f"shard {shard} in {run.folder} is not finished: `{again} --shard {shard}` goes on from what is there"]
    return []


def join(run: Run, shards: Iterable[Run]) -> None:
    """Write the rows of the shards and the run's own rows into the run folder, each once, in key order.

    Every file is written atomically, so a killed merge can be repeated.
    """
    sources = [run, *shards]

    def index(name: str, key: KeyOf) -> RowIndex:
        return RowIndex([source.rows(name) for source in sources], key)

    chains = index("chains.jsonl", chain_key)
    rows = {
        "turns.jsonl": index("turns.jsonl", turn_key),
        "failed.jsonl": index("failed.jsonl", lambda row: None if chain_key(row) in chains else chain_key(row)),
        "chains.jsonl": chains,
    }
    for name, merged in rows.items():
        write_lines(run[name], merged.lines())
    # The run's own sessions; rows that an earlier merge added are dropped, so that they do not count twice.
    sessions = [row for row in run.rows("sessions.jsonl") if "shard" not in row]
    for shard in shards:
        sessions += [row | {"shard": str(_shard_of(shard))} for row in shard.rows("sessions.jsonl")]
    write_lines(run["sessions.jsonl"], [json.dumps(row).encode() + b"\n" for row in sessions])
