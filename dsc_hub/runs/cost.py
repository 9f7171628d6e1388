"""Cost of a stage, summed over all of its sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.serving import PriceConfig
from dsc_hub.runs.run import Run

MILLION = 1_000_000
TAKEN_OVER = "taken_over"  # key of a turn that another run generated and paid for


def usd(price: PriceConfig | None, prompt_tokens: int, new_tokens: int) -> float | None:
    """Return the price of tokens that were read and written; None without a price."""
    if price is None:
        return None
    return (prompt_tokens * price.input + new_tokens * price.output) / MILLION


def prices_of(recipe: Recipe) -> tuple[PriceConfig | None, PriceConfig | None]:
    """Return the prices of the base and of whoever writes the critiques."""
    critic = recipe.chain.critic
    return recipe.serving.price, critic.price if critic else recipe.serving.price


def spent(recipe: Recipe, turns: Iterable[Mapping[str, Any]], *, critic_alone: bool = False) -> float | None:
    """Return the USD that recorded turns (rows of turns.jsonl) cost; None if the price of one of them is not given.

    With `critic_alone` the model itself answered at no price, and only the critiques cost something.

    Turns that were taken over from another run count with their price, though that run paid for them.
    """
    base, critic = prices_of(recipe)
    if base is None:
        return None
    total = 0.0
    for row in turns:
        if critic_alone and row["role"] != "critique":
            continue
        part = usd(critic if row["role"] == "critique" else base, row["prompt_tokens"], row["new_tokens"])
        if part is None:
            return None
        total += part
    return total


def add_session(run: Run, stage: str, cost: Mapping[str, Any]) -> None:
    """Append the cost of one session to sessions.jsonl.

    `cost` has seconds and new_tokens; optional keys are reused_tokens, cached_tokens, looked_up_tokens, retries,
    scoring_s, processors and kind.
    """
    rows = run.rows("sessions.jsonl")
    rows.append({"stage": stage, **cost})
    rows.close()


def spent_of(run: Run, stage: str, turns: str) -> tuple[int, float]:
    """Return the new tokens and hours that a stage has used; turns taken over from other runs are not counted.

    The tokens of a killed session are counted, its hours are not recorded.
    """
    sessions = [row for row in run.rows("sessions.jsonl") if row["stage"] == stage]
    tokens = sum(row["new_tokens"] for row in run.rows(turns) if not row.get(TAKEN_OVER))
    return tokens, sum(row["seconds"] for row in sessions) / 3600


def cost_of(run: Run, stage: str, turns: str, recipe: Recipe | None = None) -> dict[str, Any]:
    """Return the token counts of all turns and the summed cost of all sessions of a stage.

    The costs are seconds, new tokens per second, the share of prompt tokens found in the servers' prefix caches,
    processor hours, scoring seconds, retried requests by reason, and USD by the prices of the recipe.

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
        "cost_usd": spent(recipe, run.rows(turns)) if recipe else None,
    }
