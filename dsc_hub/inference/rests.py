"""Failures of a server in a row, and when it should rest because of them. No clock and no I/O.

Some failures among many answers say nothing about the load of a server: their requests are sent again, and nothing else
changes. When it refuses all that is sent, it has no room: it rests, and its requests go to the others or wait.

Refusals come at once and answers late, so that the order of the replies tells nothing. What counts is the order in
which the requests were sent, where a request that is still in flight was not refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

STREAK = 10  # failures in a row; by chance, where each second request fails, 1 in 1,000 times
RESTS = 10  # rests with no answer between them after which a server is given up: some minutes


@dataclass
class FailureStreak:
    """Failures of one server since the last request that it did not fail.

    `rests`: rests with no answer between them. `is_trial`: the last rest ended early, since an earlier request was
    answered; a failure of the next one proves that wrong.
    """

    rests: int = 0
    is_trial: bool = False
    _next: int = 0  # number of the next request
    _in_flight: set[int] = field(default_factory=set)
    _accepted: int = -1  # the latest request that was answered, or with which the count began anew
    _resumed: int = 0  # the first request after the last rest
    _unanswered: int = 0  # failures since the last answer, in the order of the replies

    def send(self) -> int:
        """Count a request and return its number."""
        number = self._next
        self._next += 1
        self._in_flight.add(number)
        return number

    def failed(self, number: int) -> bool:
        """Record that a request failed; return whether the server should rest."""
        self._in_flight.discard(number)
        self._unanswered += number >= self._resumed
        # The second condition is for failures that take as long as answers: none of those in flight was answered.
        return self._run_to(number) >= STREAK or self._unanswered >= STREAK + len(self._in_flight)

    def _run_to(self, number: int) -> int:
        """Return the number of failures in a row, in the order of sending, that end with this request."""
        in_flight = max((n for n in self._in_flight if n < number), default=-1)
        return max(0, number - max(self._accepted, in_flight))

    def answered(self, number: int) -> None:
        """Record the answer to a request."""
        self._in_flight.discard(number)
        self._accepted = max(self._accepted, number)
        self._unanswered = 0
        if number >= self._resumed:
            self.rests, self.is_trial = 0, False

    def dropped(self, number: int) -> None:
        """Record the end of a request that the server did not fail, but did not answer either; else nothing."""
        if number in self._in_flight:
            self._in_flight.remove(number)
            self._accepted = max(self._accepted, number)

    def resume(self) -> None:
        """End a rest whose time is over. Half as many failures begin the next."""
        self._accepted = max(self._accepted, self._next - 1 - STREAK // 2)
        self._resumed, self._unanswered, self.is_trial = self._next, STREAK // 2, False

    def resume_early(self) -> None:
        """End a rest because a request that was sent before it is answered: there is room again for that one."""
        self._resumed, self.is_trial = self._next, True
        self.rests -= 1
