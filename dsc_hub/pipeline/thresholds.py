"""Check of the thresholds of training rows against the range of the reward, before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsc_hub.config.recipe import Recipe, least_gain
from dsc_hub.records import Prompt


def threshold_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a problem for each threshold of the training rows that no chain can reach: then no row would be left."""
    from dsc_hub.metrics import loading

    least, gain, enough = recipe.dataset.min_reward, least_gain(recipe), recipe.chain.good_enough
    if least is None and not gain and enough is None:
        return
    low, high = loading.reward_bounds(recipe)
    if least is not None and high is not None and least > high:
        yield (
            f"dataset.min_reward: {least:g} is above what the reward can reach: {_range(low, high)}; lower it, or set "
            "null for no limit"
        )
    if enough is not None and high is not None and enough > high:
        yield f"chain.good_enough: {enough:g} is above what the reward can reach: {_range(low, high)}; lower it"
    # Where a first answer is not clean its gain counts as infinite, but rows of such chains alone are not meant.
    if gain and low is not None and high is not None and gain >= high - low:
        yield (
            f"dataset.min_gain: a gain must be above {gain:g}, and it can be at most {high - low:g}, as the reward is "
            f"{_range(low, high)}; lower it"
        )


def missing_rows(recipe: Recipe, prompts: Sequence[Prompt]) -> list[str]:
    """Return a problem if all chains of all training prompts can't give the rows that are wanted."""
    rows, most = recipe.dataset.rows, recipe.dataset.rows_per_prompt
    training = sum(p.split == "train" for p in prompts)
    each = min(recipe.chain.chains_per_prompt, most or recipe.chain.chains_per_prompt)
    if rows is None or training * each >= rows:
        return []
    what = "dataset.rows_per_prompt" if most == each else "chain.chains_per_prompt"
    return [
        f"dataset.rows: {rows} are wanted, and {training} training prompts give at most {training * each}, {each} for "
        f"each; raise {what}, or add prompts"
    ]


def _range(low: float | None, high: float) -> str:
    return f"at most {high:g}" if low is None else f"{low:g} to {high:g}"
