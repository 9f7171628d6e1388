"""What a run asks of its servers at most: requests, tokens read and written, their price, and the time quotas allow.

The rule for tokens read: every text is as long as `generation.max_new_tokens` allows, each message adds
`TURN_OVERHEAD` tokens, and texts are counted by the base's tokenizer (a critic's may differ a little). No request reads
more than `serving.context`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_hub.config.arms import ARMS
from dsc_hub.config.models import is_priced
from dsc_hub.config.recipe import Recipe
from dsc_hub.inference.base_model import TURN_OVERHEAD
from dsc_hub.records import Prompt
from dsc_hub.runs.cost import prices_of, usd

LETTERS_PER_TOKEN = 2  # of a model without a fast tokenizer; generous: English has about four


@dataclass(frozen=True)
class Work:
    """Requests to one server (or all of the base's), and their tokens at most."""

    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
        )

    def times(self, n: int) -> Work:
        return Work(n * self.requests, n * self.prompt_tokens, n * self.new_tokens)


@dataclass(frozen=True)
class StageWork:
    """The work of a stage by who does it: the base, and a critic at a server of its own (no requests without one)."""

    base: Work
    critic: Work

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork(self.base + other.base, self.critic + other.critic)

    def times(self, n: int) -> StageWork:
        return StageWork(self.base.times(n), self.critic.times(n))


NOTHING = StageWork(Work(), Work())


@dataclass(frozen=True)
class QuotaTime:
    """Least seconds of a stage by the stated quotas: by its requests, and by its tokens if all answers are full length.

    None for a quota that is not stated.
    """

    requests_s: float | None
    tokens_s: float | None


def counter(model_folder: Path | None) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text, without special tokens; None: no tokenizer is known."""
    file = model_folder and model_folder / "tokenizer.json"
    if file is None or not file.is_file():
        return lambda text: -(-len(text) // LETTERS_PER_TOKEN)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def work_of(recipe: Recipe, prompts: Sequence[Prompt], count: Callable[[str], int]) -> dict[str, StageWork]:
    """Return the work of sampling and evaluation at the priced servers, at most."""
    lengths = [(p.split, sum(count(m["content"]) + TURN_OVERHEAD for m in p.conversation)) for p in prompts]
    c, e = recipe.chain, recipe.evaluation
    chain, answer = _chain_work(recipe, count), _answer_work(recipe, count)
    sampled = _sum(chain(n) for split, n in lengths if split in ("train", "validation"))
    ways: dict[str | None, set[str]] = {}
    for arm in (ARMS[name] for name in e.arms):
        if is_priced(recipe, arm.model):
            ways.setdefault(arm.model, set()).add(arm.way)
    evaluated = NOTHING
    for n in (n for split, n in lengths if split == e.split):
        for used in ways.values():
            evaluated += chain(n) if "chain" in used else answer(n)
            evaluated += answer(n).times(2 * c.steps) if "best" in used else NOTHING
    return {
        "sampling": sampled.times(c.chains_per_prompt * recipe.rounds),
        "evaluation": evaluated.times(e.samples),
    }


def _answer_work(recipe: Recipe, count: Callable[[str], int]) -> Callable[[int], StageWork]:
    """Return the work of a plain answer, by the tokens of its prompt."""
    system = TURN_OVERHEAD + count(recipe.chain.system) if recipe.chain.system else 0
    written, most = recipe.generation.most_tokens, recipe.serving.context
    return lambda n: StageWork(Work(1, min(most, system + n + TURN_OVERHEAD), written), Work())


def _chain_work(recipe: Recipe, count: Callable[[str], int]) -> Callable[[int], StageWork]:
    """Return the work of a chain, by the tokens of its prompt."""
    c, new, most = recipe.chain, recipe.generation.max_new_tokens, recipe.serving.context
    answer, written = _answer_work(recipe, count), recipe.generation.most_tokens
    principle = max(map(count, c.principles), default=0)
    fixed = {text: count(text) + text.count("{principle}") * principle for text in (c.critique, c.revision)}

    def request(text: str, n: int) -> int:
        # A group's name is rarely longer than its prompt.
        return fixed[text] + text.count("{answer}") * new + (text.count("{prompt}") + text.count("{group}")) * n

    def work(n: int) -> StageWork:
        opening = answer(n)
        to_critic = opening.base.prompt_tokens + new + request(c.critique, n) + 2 * TURN_OVERHEAD
        to_reviser = to_critic + new + request(c.revision, n) + 2 * TURN_OVERHEAD
        critique, revision = Work(1, min(most, to_critic), written), Work(1, min(most, to_reviser), written)
        step = StageWork(revision, critique) if c.critic else StageWork(revision + critique, Work())
        return opening + step.times(c.steps)

    return work


def _sum(parts: Iterable[StageWork]) -> StageWork:
    total = NOTHING
    for part in parts:
        total += part
    return total


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
