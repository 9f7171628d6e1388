"""What a run asks of its servers at most: requests, tokens read and written, their price, and the time quotas allow.

The rule for tokens read: every text is as long as `generation.max_new_tokens` allows, each message adds
`TURN_OVERHEAD` tokens, and texts are counted by the base's tokenizer (a critic's may differ a little). No request reads
more than `serving.context`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsc_hub.config.models import is_priced, ways_by_model
from dsc_hub.config.recipe import Recipe
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.records import Prompt
from dsc_hub.runs.cost import prices_of, usd


@dataclass(frozen=True)
class ServerWork:
    """Requests to one server (or all of the base's), and their tokens at most."""

    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0

    def __add__(self, other: ServerWork) -> ServerWork:
        return ServerWork(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
        )

    def times(self, n: float) -> ServerWork:
        """Return n times the work, rounded up; n may be a share."""
        return ServerWork(*(math.ceil(n * part) for part in (self.requests, self.prompt_tokens, self.new_tokens)))


@dataclass(frozen=True)
class StageWork:
    """The work of a stage by who does it: the base, and a critic at a server of its own (no requests without one)."""

    base: ServerWork
    critic: ServerWork

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork(self.base + other.base, self.critic + other.critic)

    def times(self, n: float) -> StageWork:
        return StageWork(self.base.times(n), self.critic.times(n))


NOTHING = StageWork(ServerWork(), ServerWork())


@dataclass(frozen=True)
class QuotaTime:
    """Least seconds of a stage by the stated quotas: by its requests, and by its tokens if all answers are full length.

    None for a quota that is not stated.
    """

    requests_s: float | None
    tokens_s: float | None


def work_of(recipe: Recipe, prompts: Sequence[Prompt], count: Callable[[str], int]) -> dict[str, StageWork]:
    """Return the work of sampling and evaluation at the priced servers, at most."""
    lengths = [(p.split, opening_tokens(p, 0, count)) for p in prompts]
    c, e = recipe.chain, recipe.evaluation
    chain, answer = _chain_work(recipe, count), _answer_work(recipe, count)
    sampled = sum((chain(n) for split, n in lengths if split in ("train", "validation")), NOTHING)
    evaluated = NOTHING
    for n in (n for split, n in lengths if split == e.split):
        for model, used in ways_by_model(recipe).items():
            asked = chain(n) if "chain" in used else answer(n)
            asked += answer(n).times(2 * c.steps) if "best" in used else NOTHING
            # Where a model is served here, its critic may be asked elsewhere all the same.
            evaluated += asked if is_priced(recipe, model) else StageWork(ServerWork(), asked.critic)
    return {
        "sampling": sampled.times(c.chains_per_prompt * recipe.rounds),
        "evaluation": evaluated.times(e.samples),
    }


def opening_tokens(prompt: Prompt, system: int, count: Callable[[str], int]) -> int:
    """Return the tokens of the conversation before the first answer; a single turn has no overhead in it.

    `system` are those of the recipe's system text.
    """
    turns = prompt.conversation
    tokens = sum(count(m["content"]) for m in turns) + TURN_OVERHEAD * (len(turns) - 1)
    return tokens + (system if prompt.system is None else 0) + (count(json.dumps(prompt.tools)) if prompt.tools else 0)


def _answer_work(recipe: Recipe, count: Callable[[str], int]) -> Callable[[int], StageWork]:
    """Return the work of a plain answer, by the tokens of its prompt."""
    system = TURN_OVERHEAD + count(recipe.chain.system) if recipe.chain.system else 0
    written, most = recipe.generation.most_tokens, recipe.serving.context
    return lambda n: StageWork(ServerWork(1, min(most, system + n + TURN_OVERHEAD), written), ServerWork())


def _chain_work(recipe: Recipe, count: Callable[[str], int]) -> Callable[[int], StageWork]:
    """Return the work of a chain, by the tokens of its prompt."""
    c, new, most = recipe.chain, recipe.generation.max_new_tokens, recipe.serving.context
    answer, written = _answer_work(recipe, count), recipe.generation.most_tokens
    principle = max(map(count, c.principles), default=0)
    pairs = c.pairs
    fixed = {text: count(text) + text.count("{principle}") * principle for pair in pairs for text in pair}

    def request(text: str, n: int) -> int:
        # A group's name is rarely longer than its prompt.
        return fixed[text] + text.count("{answer}") * new + (text.count("{prompt}") + text.count("{group}")) * n

    def work(n: int) -> StageWork:
        opening = answer(n)
        to_critic = (
            opening.base.prompt_tokens + new + max(request(critique, n) for critique, _ in pairs) + 2 * TURN_OVERHEAD
        )
        to_reviser = to_critic + new + max(request(revision, n) for _, revision in pairs) + 2 * TURN_OVERHEAD
        critique, revision = ServerWork(1, min(most, to_critic), written), ServerWork(1, min(most, to_reviser), written)
        step = StageWork(revision, critique) if c.critic else StageWork(revision + critique, ServerWork())
        return opening + step.times(c.steps)

    return work


def cost_at_most(recipe: Recipe, work: StageWork) -> float | None:
    """Return the USD that a stage costs at most; None if the price of a server that it asks is not given."""
    base, critic = prices_of(recipe)
    parts = [usd(base, work.base.prompt_tokens, work.base.new_tokens)]
    if recipe.chain.critic:
        parts.append(usd(critic, work.critic.prompt_tokens, work.critic.new_tokens))
    return None if None in parts else sum(p for p in parts if p is not None)


def quota_time(recipe: Recipe, work: StageWork) -> QuotaTime | None:
    """Return the time that the endpoints' quotas allow; None if none is stated, or nothing is asked of them."""
    s = recipe.serving
    if not (s.endpoints and work.base.requests and (s.requests_per_minute or s.tokens_per_minute)):
        return None
    n, tokens = len(s.endpoints), work.base.prompt_tokens + work.base.new_tokens
    return QuotaTime(
        60 * work.base.requests / (n * s.requests_per_minute) if s.requests_per_minute else None,
        60 * tokens / (n * s.tokens_per_minute) if s.tokens_per_minute else None,
    )
