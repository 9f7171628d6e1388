"""A run while it goes on, read from its folder: stage, counts, rate, reward so far, the last chain.

Reads only what was appended since the last look.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dsc_hub.config.stages import STAGES
from dsc_hub.records import Chain
from dsc_hub.runs.overview import is_running, state_of
from dsc_hub.runs.run import Run
from dsc_hub.system.files import parse_json

RATE_OVER_S = 60.0
_TAIL_BYTES = 4096


def current(run: Run) -> Run:
    """Return the run folder that is worked on: that of the last round, until all rounds are done."""
    rounds = [p for p in run["rounds"].glob("*") if p.name.isdecimal() and (p / "run.json").is_file()]
    if not rounds or run["sampling.done.json"].is_file():
        return run
    return Run(max(rounds, key=lambda p: int(p.name)))


@dataclass
class Watched:
    """What has been seen of a run, or of a round of it. `look` reads on and returns the current view."""

    run: Run
    whole: Run
    offset: int = 0
    chains: int = 0
    clean: int = 0
    reward_sum: float = 0.0
    proposals: int = 0
    accepted: int = 0
    last: Chain | None = None
    seen: deque[tuple[float, int]] = field(default_factory=deque)
    planned: int | None = None

    def look(self) -> View:
        for chain in self._new_chains():
            self.chains += 1
            self.last = chain
            self.proposals += len(chain.steps)
            self.accepted += sum(step.accepted for step in chain.steps)
            if not chain.final_defect and chain.final_score.value is not None:
                self.clean += 1
                self.reward_sum += chain.final_score.value
        now = time.monotonic()
        self.seen.append((now, self.chains))
        while now - self.seen[0][0] > RATE_OVER_S:
            self.seen.popleft()
        began, before = self.seen[0]
        return View(
            is_running=is_running(self.whole),
            state=state_of(self.run),
            done=[s.name for s in STAGES if self.run[f"{s.name}.done.json"].is_file()],
            stage=next((s.name for s in STAGES if not self.run[f"{s.name}.done.json"].is_file()), ""),
            chains=self.chains,
            planned=self._count_planned(),
            per_minute=(self.chains - before) / (now - began) * 60 if now - began > 1 else None,
            reward=self.reward_sum / self.clean if self.clean else None,
            clean=self.clean,
            proposals=self.proposals,
            accepted=self.accepted,
            training=_last_line(self.run["distill.log"], "step "),
            log=_last_line(self.run["log.txt"]),
            last=self.last,
        )

    def _new_chains(self) -> Iterator[Chain]:
        """Yield the chains since the last look; RunError for a damaged row."""
        rows = self.run.rows("chains.jsonl")
        if not rows.path.is_file():
            return
        if rows.path.stat().st_size < self.offset:  # sampled anew
            self.offset = self.chains = self.clean = self.proposals = self.accepted = 0
            self.reward_sum = 0.0
        with rows.path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):  # being written
                    return
                try:
                    row = parse_json(line)
                except ValueError:
                    raise rows.damaged(self.offset, "not JSON") from None
                chain = rows.typed(Chain, self.offset, row)
                self.offset += len(line)
                yield chain

    def _count_planned(self) -> int | None:
        """Return the chains that the run will have; None before its prompts are chosen."""
        if self.planned is None and self.run["prompts.done.json"].is_file():
            each = self.run.facts.recipe.chain.chains_per_prompt
            self.planned = sum(each for row in self.run.rows("prompts.jsonl") if row.get("split") != "test")
        return self.planned


@dataclass(frozen=True)
class View:
    """A run at one moment. `reward` is the mean over `clean` chains that end clean and scored."""

    is_running: bool
    state: str
    done: list[str]
    stage: str
    chains: int
    planned: int | None
    per_minute: float | None
    reward: float | None
    clean: int
    proposals: int
    accepted: int
    training: str
    log: str
    last: Chain | None


def _last_line(path: Path, holding: str = "") -> str:
    """Return the last whole line of a file that holds a text; "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line for line in reversed(lines) if holding in line), "")
