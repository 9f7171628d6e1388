"""How a child process ended, in words."""

from __future__ import annotations

import signal

BY_SIGNAL = 128  # a shell, and the supervisor, report the end by signal n as exit code 128 + n


def shown_ending(code: int) -> str:
    """Return "exit code 3", or by which signal the process was ended: `code` is -n or 128 + n then."""
    number = -code if code < 0 else code - BY_SIGNAL
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"exit code {code}"
    why = ": most often the system, for want of memory" if number == signal.SIGKILL else ""
    return f"signal {number}, {name}{why}"
