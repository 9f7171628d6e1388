"""What a stage cost, over all the sessions that it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsc_hub.runs.run import Run


def add_session(run: Run, stage: str, cost: Mapping[str, Any]) -> None:
    """Add what a session cost: {seconds, new_tokens}, and what else is known of {reused_tokens, cached_tokens,
    looked_up_tokens, retries, scoring_s, processors, kind}."""
    rows = run.rows("sessions.jsonl")
    rows.append({"stage": stage, **cost})
    rows.close()


def cost_of(run: Run, stage: str, turns: str) -> dict[str, Any]:
    """Tokens of all turns, and of all sessions together: seconds, new tokens a second, the share of prompt tokens that was
    found in the servers' prefix caches, processor hours, requests sent again by reason.

    A session that was killed left its turns but not its seconds: then `seconds` and `processor_hours` are None, and the
    rest is that of the sessions that ended. None, too, what no session knows.
    """
    asked, new = 0, 0
    for row in run.rows(turns):
        asked, new = asked + row["prompt_tokens"], new + row["new_tokens"]
    sessions = [row for row in run.rows("sessions.jsonl") if row["stage"] == stage]

    def total(key: str) -> float:
        return sum(row.get(key) or 0 for row in sessions)

    seconds, known, looked_up = total("seconds"), total("new_tokens"), total("looked_up_tokens")
    ended = bool(sessions) and known + total("reused_tokens") >= new  # more, where merged shards had some in common
    hours = [row["seconds"] * row["processors"] / 3600 for row in sessions if row.get("processors")]
    retries: Counter[str] = Counter()
    for row in sessions:
        retries.update(row.get("retries") or {})
    return {
        "prompt_tokens": asked,
        "new_tokens": new,
        "seconds": round(seconds, 1) if ended else None,
        "tokens_per_s": round(known / seconds, 1) if seconds and known else None,
        "cache_rate": round(total("cached_tokens") / looked_up, 4) if looked_up else None,
        "processor_hours": round(sum(hours), 4) if ended and len(hours) == len(sessions) else None,
        "processors": next((row["kind"] for row in sessions if row.get("kind")), None),
        "scoring_s": round(total("scoring_s"), 1) if sessions else None,
        "retries": dict(retries.most_common()),
    }
