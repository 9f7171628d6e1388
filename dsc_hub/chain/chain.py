"""One self-critique chain (arXiv:2312.01957).

A chain answers a prompt, criticises the answer, revises it, and accepts the revision if it is clean and scored and the
acceptance rule agrees. Generation, hygiene, scoring and random numbers are passed in as functions.

    x0 ~ p(x|c)      then, step by step:  z ~ p(z|x,c),  x' ~ p(x|z,x,c),  x <- x' or stay
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dsc_hub.acceptance import Rule
from dsc_hub.chain.hygiene import Finding
from dsc_hub.config.sampling import ChainConfig
from dsc_hub.records import Chain, Message, Prompt, Role, Score, Step, Turn

Generate = Callable[[list[Message], Prompt, int, int, Role], Awaitable[Turn]]  # messages, prompt, chain, step, role
ScoreText = Callable[[str, Prompt], Awaitable[Score]]
VetoText = Callable[[str, str], Awaitable[str]]  # revision, first answer -> reason to reject ("": none)
Inspect = Callable[[Turn, Prompt, str], Finding]  # turn, its prompt, its critique ("": none)
Dice = Callable[[str, int, int], float]  # prompt id, chain, step -> u in [0, 1)
ChoosePair = Callable[[str, int, int], int]  # prompt id, chain, step -> which of the pairs of texts
Aside = Callable[[], contextlib.AbstractAsyncContextManager[None]]

NOT_BETTER = "not accepted by the rule"
NOT_COMPARABLE = "not comparable: the answer is unscored"
UNSCORED = "unscored"
LOST_MEANING = "says something else than the first answer"
TOO_SHORT = "too short beside the first answer"
BY_VETO = (LOST_MEANING, TOO_SHORT)


def seed_of(run_seed: int, prompt_id: str, chain: int, step: int, what: str) -> int:
    """Return the seed of a request, 0 <= seed < 2**31; independent of order, batch, replica and resumption."""
    key = f"{run_seed}/{prompt_id}/{chain}/{step}/{what}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def dice_of(run_seed: int, what: str = "accept") -> Dice:
    """Return the random numbers of a run for the purpose `what`: u in [0, 1) by (prompt id, chain, step)."""
    return lambda prompt_id, chain, step: seed_of(run_seed, prompt_id, chain, step, what) / 2**31


async def no_veto(revision: str, first: str) -> str:
    """Reject no revision."""
    return ""


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompt templates of a chain: the critique and revision requests, an optional system message, and the principles.

    Placeholders are {prompt} (of a conversation the last user turn), {answer}, {group} and {principle}, which is one of
    `principles`. `others` are further pairs of critique and revision.
    """

    critique: str
    revision: str
    system: str | None = None
    principles: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return ((self.critique, self.revision), *self.others)

    def opening(self, prompt: Prompt) -> list[Message]:
        """Return the conversation that the first answer continues, as `opening_of`."""
        return opening_of(prompt, self.system)

    def principle(self, u: float) -> str:
        """Return the principle that u, 0 <= u < 1, selects; "" if there are none."""
        return self.principles[int(u * len(self.principles))] if self.principles else ""

    @staticmethod
    def fill(template: str, prompt: Prompt, answer: str, principle: str = "") -> str:
        """Fill all placeholders in one pass, so that braces in a prompt or in model text are never placeholders."""
        parts = {"{prompt}": prompt.text, "{answer}": answer, "{group}": prompt.group, "{principle}": principle}
        out, rest = "", template
        while rest:
            start, name = min(((rest.find(n), n) for n in parts if n in rest), default=(-1, ""))
            if start < 0:
                return out + rest
            out, rest = out + rest[:start] + parts[name], rest[start + len(name) :]
        return out


def texts_of(chain: ChainConfig) -> Texts:
    """Return the texts of a recipe's section `chain`."""
    (critique, revision), *others = chain.pairs
    return Texts(critique, revision, chain.system, chain.principles, tuple(others))


def draw_evenly(run_seed: int, count: int) -> ChoosePair:
    """Return the draws of one of `count` pairs of texts, all with the same probability."""
    dice = dice_of(run_seed, "texts")
    return lambda prompt_id, chain, step: int(dice(prompt_id, chain, step) * count)


def opening_of(prompt: Prompt, system: str | None) -> list[Message]:
    """Return the prompt's conversation, with the system text unless it has one of its own; "" and None: none."""
    return [*system_turn(system if prompt.system is None else None), *prompt.conversation]


def system_turn(text: str | None) -> list[Message]:
    """Return the turn of a system text; "" and None: none."""
    return [{"role": "system", "content": text}] if text else []


def exchange(answer: str, request: str) -> list[Message]:
    """Return the two messages that continue a conversation: the model's answer, and the next request."""
    return [{"role": "assistant", "content": answer}, {"role": "user", "content": request}]


async def run_chain(
    prompt: Prompt,
    number: int,
    *,
    texts: Texts,
    steps: int,
    generate: Generate,
    score: ScoreText,
    rule: Rule,
    dice: Dice,
    inspect: Inspect,
    veto: VetoText = no_veto,
    principle_dice: Dice = lambda prompt_id, chain, step: 0.0,
    aside: Aside = contextlib.nullcontext,
    good_enough: float | None = None,
    choose: ChoosePair = lambda prompt_id, chain, step: 0,
) -> Chain:
    """Run one chain of `steps` critiques and revisions and return it.

    It ends earlier once the state is clean and its reward at least `good_enough`. `choose` draws the pair of texts of a
    step.

    The first answer is scored while its critique and revision are generated, which do not depend on the score. The
    context manager `aside` is entered while the chain waits only for a score.

    A dirty first answer has reward -inf, so any clean, scored revision is better. With a clean but unscored first
    answer, rules that compare rewards accept no revision. A revision that is dirty, unscored or vetoed (`veto`: it lost
    too much of the first answer) never becomes the state, whatever the rule.
    """
    opening = texts.opening(prompt)
    first = await generate(opening, prompt, number, 0, "answer")
    answer = inspect(first, prompt, "")
    first_score = asyncio.ensure_future(score(answer.text, prompt))

    async def first_reward() -> float | None:
        return -math.inf if answer.defect else (await first_score).value

    try:
        state: str = answer.text
        current: float | None = None
        done: list[Step] = []
        for i in range(1, steps + 1):
            if good_enough is not None:
                if i == 1:
                    async with aside():
                        current = await first_reward()
                if current is not None and current >= good_enough:
                    break
            principle = texts.principle(principle_dice(prompt.id, number, i))
            pair = choose(prompt.id, number, i)
            to_critic, to_reviser = texts.pairs[pair]
            request = texts.fill(to_critic, prompt, state, principle)
            messages = [*opening, *exchange(state, request)]
            critique = await generate(messages, prompt, number, i, "critique")
            request = texts.fill(to_reviser, prompt, state, principle)
            messages = [*messages, *exchange(critique.text, request)]
            revision = await generate(messages, prompt, number, i, "revision")
            proposal = inspect(revision, prompt, critique.text)
            async with aside():
                proposed = await score(proposal.text, prompt)
                if i == 1 and good_enough is None:
                    current = await first_reward()
                reward, rejected = proposed.value, proposal.defect
                if not rejected:
                    rejected = UNSCORED if reward is None else await veto(proposal.text, answer.text)
            if reward is not None and not rejected and not rule(current, reward, dice(prompt.id, number, i)):
                rejected = NOT_COMPARABLE if current is None else NOT_BETTER
            if not rejected:
                state, current = proposal.text, reward
            done.append(Step(i, critique.text, proposal.text, proposed, proposal.defect, rejected, proposal.raw, pair))
        return Chain(prompt.id, number, answer.text, await first_score, answer.defect, tuple(done), answer.raw)
    finally:
        first_score.cancel()
