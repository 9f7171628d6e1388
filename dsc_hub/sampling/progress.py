"""The progress line of a sampling."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from dsc_hub.records import Chain
from dsc_hub.sampling.schedule import Ending, Schedule
from dsc_hub.system.progress import Meter

BRAKE, BRAKE_S = 0.85, 20.0  # share of the time that the scorer works, after so many seconds, from which chains wait


@dataclass
class SamplingProgress:
    """Counts of the progress line: finished + failed + pending = total. Remaining time is estimated by turns."""

    total: int
    turns: int  # turns of a chain that does not end early
    scoring_s: Callable[[], float] = float  # seconds that the scorer has worked since the start
    finished: int = 0
    failed: int = 0
    accepted: int = 0
    proposals: int = 0
    unscored: int = 0
    new_tokens: int = 0
    reused_turns: int = 0
    ending: Ending | None = None  # if a schedule ended it
    rows: str = ""  # training rows so far, of those that are wanted; "": no number is asked for
    interrupted: bool = False
    meter: Meter = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.meter = Meter(self.total * self.turns - self.reused_turns)

    def chain_done(self, chain: Chain, turns: int) -> None:
        """Count a finished chain, which took so many turns."""
        self.finished += 1
        self.meter.total -= self.turns - turns
        self.proposals += len(chain.steps)
        self.accepted += sum(s.accepted for s in chain.steps)
        self.unscored += (chain.answer_score.value is None) + sum(s.score.value is None for s in chain.steps)

    def chain_failed(self, turns: int) -> None:
        """Count a chain that failed after so many turns."""
        self.failed += 1
        self.meter.total -= self.turns - turns

    def expect(self, schedule: Schedule) -> None:
        """Take over how many chains there will be, and the rows."""
        turns = self.meter.total / max(1, self.total)  # the mean of a chain
        self.total = max(self.finished + self.failed, schedule.expected - schedule.before)
        self.meter.total = round(self.total * turns)
        self.rows = f"rows {min(schedule.rows_so_far, schedule.target)}/{schedule.target}  " if schedule.target else ""

    @property
    def waits_for_scores(self) -> bool:
        """Whether the scorer works nearly all of the time, so that chains wait for it and not for the model."""
        seconds = time.monotonic() - self.started
        return seconds >= BRAKE_S and self.scoring_s() >= BRAKE * seconds

    def line(self) -> str:
        """Return the current text of the progress line."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        share = f" ({self.accepted / self.proposals:.0%})" if self.proposals else ""
        return (
            f"{self.rows}chains {self.finished + self.failed}/{self.total}  failed {self.failed}  revisions accepted "
            f"{self.accepted}/{self.proposals}{share}  unscored {self.unscored}  {self.new_tokens / seconds:.0f} "
            f"tokens/s{self.meter.left()}{'  the scorer is the brake' * self.waits_for_scores}"
        )
