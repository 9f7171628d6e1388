"""The plan's bound on tokens, money and quota time, against what requests then hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.chain.chain import Texts, run_chain
from dsc_hub.chain.hygiene import inspect
from dsc_hub.config import recipe_files
from dsc_hub.config.fingerprints import stage_fingerprints
from dsc_hub.config.recipe import Recipe
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.inference.client import Completion
from dsc_hub.pipeline.work import QuotaTime, ServerWork, StageWork, cost_at_most, quota_time, work_of
from dsc_hub.records import Prompt, Score
from dsc_hub.runs.cost import spent

CRITIC = "chain.critic={model: c, endpoint: 'http://c/v1'}"
PRICE = "serving.price={input: 2, output: 10}"


def words(text: str) -> int:
    return len(text.split())


def prompts() -> list[Prompt]:
    return [Prompt(f"p{i}", "one two three " * (i + 1), f"g{i}", "train" if i < 3 else "test") for i in range(5)]


def test_a_critic_elsewhere_costs_where_the_base_is_served_here(recipe_file: Path):
    """The endpoints write the chains; base and adapter answer here, and their critiques come from the paid critic."""
    served = ["serving.endpoints=['http://a/v1']", PRICE, CRITIC[:-1] + ", price: {input: 10, output: 30}}"]
    arms = "evaluation.arms=[base, self_critique, distilled]"
    recipe = recipe_files.load_recipe_file(recipe_file, [*served, arms])
    work = work_of(recipe, prompts(), words)["evaluation"]
    assert work.base.requests == 0 and work.critic.requests == 2 * recipe.chain.steps * recipe.evaluation.samples
    assert cost_at_most(recipe, work) > 0
    rows = [{"role": role, "prompt_tokens": 100, "new_tokens": 10} for role in ("answer", "critique", "revision")]
    assert spent(recipe, rows, critic_alone=True) == pytest.approx((100 * 10 + 10 * 30) / 1e6)


def test_work_that_is_half_done_is_rounded_up():
    assert ServerWork(3, 100, 11).times(0.5) == ServerWork(2, 50, 6)


@pytest.mark.parametrize("critic", [(), (CRITIC,)])
def test_the_bound_is_what_the_chains_read_when_all_answers_are_of_full_length(recipe_file: Path, critic: tuple):
    texts = ["chain.critique='What of {answer} to {prompt}?'", "chain.system='Be kind always'", "hygiene.repeated=1"]
    recipe = recipe_files.load_recipe_file(recipe_file, [*texts, *critic, "generation.max_new_tokens=7"])
    read: dict[str, int] = {"critique": 0, "other": 0}
    asked: dict[str, int] = {"critique": 0, "other": 0}

    async def generate(messages: list[dict], prompt: Prompt, number: int, step: int, role: str) -> Any:
        key = role if role == "critique" and critic else "other"
        read[key] += sum(words(m["content"]) + TURN_OVERHEAD for m in messages)
        asked[key] += 1
        return Completion("a b c d e f g", "stop", 0, 7)

    async def score(text: str, prompt: Prompt) -> Score:
        return Score(1.0)

    c = recipe.chain
    for prompt in prompts()[:3]:
        asyncio.run(
            run_chain(
                prompt,
                0,
                texts=Texts(c.critique, c.revision, c.system),
                steps=c.steps,
                generate=generate,
                score=score,
                rule=lambda current, new, u: True,
                dice=lambda *key: 0.5,
                inspect=lambda t, p, critique: inspect(t.text, "stop", p, critique, recipe.hygiene),
            )
        )
    work = work_of(recipe, prompts(), words)["sampling"]
    assert (work.base.requests, work.critic.requests) == (asked["other"], asked["critique"])
    # A placeholder counts as a word of its own, once a request.
    for part, key in ((work.base, "other"), (work.critic, "critique")):
        assert read[key] <= part.prompt_tokens <= read[key] + 2 * part.requests
        assert part.new_tokens == 7 * part.requests


def test_money_is_of_both_prices_and_unknown_where_one_is_missing(recipe_file: Path):
    work = StageWork(ServerWork(3, 1_000_000, 100_000), ServerWork(2, 500_000, 200_000))
    own = recipe_files.load_recipe_file(recipe_file, [PRICE])
    both = recipe_files.load_recipe_file(recipe_file, [PRICE, CRITIC, "chain.critic.price={input: 1, output: 0}"])
    without = recipe_files.load_recipe_file(recipe_file, [PRICE, CRITIC])
    assert cost_at_most(own, StageWork(work.base, ServerWork())) == pytest.approx(3.0)
    assert cost_at_most(both, work) == pytest.approx(3.5)
    assert cost_at_most(without, work) is None
    turns = [
        {"role": "answer", "prompt_tokens": 1_000_000, "new_tokens": 100_000},
        {"role": "critique", "prompt_tokens": 500_000, "new_tokens": 200_000},
    ]
    assert spent(both, turns) == pytest.approx(3.5) and spent(own, turns) == pytest.approx(6.0)
    assert spent(without, turns) is None and spent(without, turns[:1]) == pytest.approx(3.0)
    assert spent(recipe_files.load_recipe_file(recipe_file), turns) is None


def test_quotas_are_of_each_endpoint(recipe_file: Path):
    urls = "serving.endpoints=[http://a/v1, http://b/v1]"
    work = StageWork(ServerWork(600, 40_000, 20_000), ServerWork())
    limits = [urls, "serving.requests_per_minute=30", "serving.tokens_per_minute=1000"]
    assert quota_time(recipe_files.load_recipe_file(recipe_file, limits), work) == QuotaTime(600.0, 1800.0)
    assert quota_time(recipe_files.load_recipe_file(recipe_file, limits[:2]), work) == QuotaTime(600.0, None)
    assert quota_time(recipe_files.load_recipe_file(recipe_file, [urls]), work) is None


def fingerprints(recipe: Recipe) -> dict[str, str]:
    places = ("prompts", "model", "reward", "second_scorer", "third_scorer")
    return stage_fingerprints(recipe, dict.fromkeys(places, ""))


def test_prices_and_quotas_are_in_no_fingerprint_and_a_critics_parameters_are(recipe_file: Path):
    def of(*overrides: str) -> dict[str, str]:
        return fingerprints(recipe_files.load_recipe_file(recipe_file, overrides))

    quotas = ("serving.requests_per_minute=3", "serving.tokens_per_minute=3")
    assert of(PRICE, *quotas) == of()
    assert of(CRITIC, "chain.critic.price={input: 1, output: 1}") == of(CRITIC)
    assert of(CRITIC, "chain.critic.extra={top_k: 1}")["sampling"] != of(CRITIC)["sampling"]
