"""Check of the thresholds of training rows against the range of the reward, before anything is sampled."""

from __future__ import annotations

from collections.abc import Iterator

from dsc_hub.config.recipe import Recipe, least_gain


def threshold_problems(recipe: Recipe) -> Iterator[str]:
    """Yield a problem for each threshold of the training rows that no chain can reach: then no row would be left."""
    from dsc_hub.metrics import loading

    least, gain = recipe.dataset.min_reward, least_gain(recipe)
    if least is None and not gain:
        return
    low, high = loading.reward_bounds(recipe)
    if least is not None and high is not None and least > high:
        yield (
            f"dataset.min_reward: {least:g} is above what the reward can reach: {_range(low, high)}; lower it, or set "
            "null for no limit"
        )
    # Where a first answer is not clean its gain counts as infinite, but rows of such chains alone are not meant.
    if gain and low is not None and high is not None and gain >= high - low:
        yield (
            f"dataset.min_gain: a gain must be above {gain:g}, and it can be at most {high - low:g}, as the reward is "
            f"{_range(low, high)}; lower it"
        )


def _range(low: float | None, high: float) -> str:
    return f"at most {high:g}" if low is None else f"{low:g} to {high:g}"
