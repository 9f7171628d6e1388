"""Cost of a stage, summed over all of its sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsc_hub.runs.run import Run


def add_session(run: Run, stage: str, cost: Mapping[str, Any]) -> None:
    """Append the cost of one session to sessions.jsonl.

    `cost` has seconds and new_tokens; optional keys are reused_tokens, cached_tokens, looked_up_tokens, retries,
    scoring_s, processors and kind.
    """
    rows = run.rows("sessions.jsonl")
    rows.append({"stage": stage, **cost})
    rows.close()


def cost_of(run: Run, stage: str, turns: str) -> dict[str, Any]:
    """Return the token counts of all turns and the summed cost of all sessions of a stage.

    The costs are seconds, new tokens per second, the share of prompt tokens found in the servers' prefix caches,
    processor hours, scoring seconds and retried requests by reason.

    A killed session leaves its turns but no record of its seconds. `seconds` and `processor_hours` are then None, and
    the other values cover only the sessions that ended. A value that no session recorded is None as well.
    """
    prompt_tokens, new_tokens = 0, 0
    for row in run.rows(turns):
        prompt_tokens, new_tokens = prompt_tokens + row["prompt_tokens"], new_tokens + row["new_tokens"]
    sessions = [row for row in run.rows("sessions.jsonl") if row["stage"] == stage]

    def total(key: str) -> float:
        return sum(row.get(key) or 0 for row in sessions)

    seconds, session_tokens, looked_up = total("seconds"), total("new_tokens"), total("looked_up_tokens")
    # The sum can exceed the turns' tokens: merged shards may share turns.
    ended = bool(sessions) and session_tokens + total("reused_tokens") >= new_tokens
    hours = [row["seconds"] * row["processors"] / 3600 for row in sessions if row.get("processors")]
    retries: Counter[str] = Counter()
    for row in sessions:
        retries.update(row.get("retries") or {})
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 1) if ended else None,
        "tokens_per_s": round(session_tokens / seconds, 1) if seconds and session_tokens else None,
        "cache_rate": round(total("cached_tokens") / looked_up, 4) if looked_up else None,
        "processor_hours": round(sum(hours), 4) if ended and len(hours) == len(sessions) else None,
        "processors": next((row["kind"] for row in sessions if row.get("kind")), None),
        "scoring_s": round(total("scoring_s"), 1) if sessions else None,
        "retries": dict(retries.most_common()),
    }
