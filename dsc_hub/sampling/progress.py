"""The progress line of a sampling."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dsc_hub.records import Chain
from dsc_hub.runs.row_index import Key
from dsc_hub.sampling.schedule import Ending, Schedule
from dsc_hub.system.progress import Meter

BRAKE, BRAKE_S = 0.85, 20.0  # share of the time that the scorer works, after so many seconds, from which chains wait


class TurnsLeft:
    """Estimate of the turns that chains will still ask for, where chains may end early.

    Of the chains that came to the end of turn k and whose way from there is known, a share went on. The turns that
    follow are expected by these shares, as lifetimes are where some still last (Kaplan and Meier 1958): chains in
    flight are longer than those that have ended, so a mean of the latter would be too low.
    """

    def __init__(self, turns: int) -> None:
        self._most = turns  # of a chain
        self._turn = Counter[Key]()  # that each chain in flight is at, from 1 on
        self._asked, self._ended = Counter[int](), Counter[int]()  # chains that asked for turn k; that ended at it

    def ask(self, chain: Key) -> None:
        """Record that a chain asks for its next turn."""
        self._turn[chain] += 1
        self._asked[self._turn[chain]] += 1

    def end(self, chain: Key) -> None:
        """Record that a chain has finished or failed."""
        self._ended[self._turn.pop(chain, 0)] += 1

    @property
    def in_flight(self) -> int:
        """Chains that have begun and not ended."""
        return len(self._turn)

    def count(self, chains: int) -> float:
        """Return how many turns are expected if there will be so many chains, without those that were made."""
        left, rest = 0.0, 0.0  # `rest`: turns from turn k + 1 on of a chain that asks for it
        for k in range(self._most, 0, -1):
            went_on, ended = self._asked[k + 1], self._ended[k]
            behind = rest * went_on / (went_on + ended) if went_on + ended else rest
            left += (self._asked[k] - went_on - ended) * (1 + behind)
            rest = 1 + behind
        return left + max(0, chains - self._asked[1] - self._ended[0]) * rest


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
    meter: Meter = field(default_factory=lambda: Meter(0))
    left: TurnsLeft = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = TurnsLeft(self.turns)

    def chain_done(self, chain: Chain) -> None:
        self.finished += 1
        self.left.end((chain.prompt_id, chain.number))
        self.proposals += len(chain.steps)
        self.accepted += sum(s.accepted for s in chain.steps)
        self.unscored += (chain.answer_score.value is None) + sum(s.score.value is None for s in chain.steps)

    def chain_failed(self, key: Key) -> None:
        self.failed += 1
        self.left.end(key)

    def expect(self, schedule: Schedule) -> None:
        """Take over how many chains there will be, and the rows."""
        self.total = max(self.finished + self.failed, schedule.expected - schedule.before)
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
        self.meter.total = self.meter.done + round(self.left.count(self.total))
        return (
            f"{self.rows}chains {self.finished + self.failed}/{self.total}  failed {self.failed}"
            f"{self.meter.left(self.left.in_flight)}  {self.new_tokens / seconds:.0f} tokens/s  revisions accepted "
            f"{self.accepted}/{self.proposals}{share}  unscored {self.unscored}"
            f"{'  the scorer is the brake' * self.waits_for_scores}"
        )
