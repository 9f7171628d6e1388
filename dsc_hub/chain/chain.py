"""One self-critique chain. Answers a prompt, criticises the answer, revises it, and keeps the revision if it is clean,
scored, and the acceptance rule says so. Does not know where text comes from, what is clean or how it is scored: all three
are handed in, and so are the dice. arXiv:2312.01957.

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
from dsc_hub.records import Chain, Prompt, Role, Score, Step, Turn

Message = dict[str, str]
Generate = Callable[[list[Message], Prompt, int, int, Role], Awaitable[Turn]]  # messages, prompt, chain, step, role
ScoreText = Callable[[str, Prompt], Awaitable[Score]]
VetoText = Callable[[str, str], Awaitable[str]]  # a revision, the first answer -> why it must not be kept ("": it may)
Inspect = Callable[[Turn, Prompt, str], Finding]  # what was written, for which prompt, after which critique ("": none)
Dice = Callable[[str, int, int], float]  # prompt id, chain, step -> u in [0, 1)
Aside = Callable[[], contextlib.AbstractAsyncContextManager[None]]

NOT_BETTER = "not accepted by the rule"
NOT_COMPARABLE = "not comparable: the answer is unscored"
UNSCORED = "unscored"
LOST_MEANING = "says something else than the first answer"
TOO_SHORT = "too short beside the first answer"
BY_VETO = (LOST_MEANING, TOO_SHORT)


def seed_of(run_seed: int, prompt_id: str, chain: int, step: int, what: str) -> int:
    """Seed of one request, 0 <= seed < 2**31: depends on what is asked alone, not on order, batch, replica or resumption."""
    key = f"{run_seed}/{prompt_id}/{chain}/{step}/{what}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def dice_of(run_seed: int, what: str = "accept") -> Dice:
    """Dice of a run, for acceptance or for something else: u in [0, 1) by (prompt, chain, step)."""
    return lambda prompt_id, chain, step: seed_of(run_seed, prompt_id, chain, step, what) / 2**31


async def no_veto(revision: str, first: str) -> str:
    """Every revision may be kept."""
    return ""


@dataclass(frozen=True, slots=True)
class Texts:
    """What the model is asked: the system message if any, and the two requests with {prompt}, {answer}, {group} and
    {principle}, one of `principles`."""

    critique: str
    revision: str
    system: str | None = None
    principles: tuple[str, ...] = ()

    def opening(self, prompt: str) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]

    def principle(self, u: float) -> str:
        """The principle that the dice, 0 <= u < 1, choose; "" where there are none."""
        return self.principles[int(u * len(self.principles))] if self.principles else ""

    @staticmethod
    def fill(template: str, prompt: Prompt, answer: str, principle: str = "") -> str:
        """All placeholders at once, so that braces in a prompt or in model text are never taken for placeholders."""
        parts = {"{prompt}": prompt.text, "{answer}": answer, "{group}": prompt.group, "{principle}": principle}
        out, rest = "", template
        while rest:
            at, name = min(((rest.find(n), n) for n in parts if n in rest), default=(-1, ""))
            if at < 0:
                return out + rest
            out, rest = out + rest[:at] + parts[name], rest[at + len(name) :]
        return out


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
) -> Chain:
    """Run one chain of `steps` critiques and revisions and return it whole.

    The first answer is scored while its critique and revision are written, which don't depend on the score. `aside` is entered
    while the chain waits for nothing but a score.

    A first answer that is dirty has reward -inf: any clean, scored revision is then better. Beside a clean one that is
    unscored nothing can be better: a rule that compares rewards keeps no revision then. A revision that is dirty or
    unscored, or that has lost too much of the first answer (`veto`), never becomes the state, whatever the rule.
    """
    opening = texts.opening(prompt.text)
    first = await generate(opening, prompt, number, 0, "answer")
    found = inspect(first, prompt, "")
    first_score = asyncio.ensure_future(score(found.text, prompt))
    try:
        state: str = found.text
        current: float | None = None
        done: list[Step] = []
        for i in range(1, steps + 1):
            principle = texts.principle(principle_dice(prompt.id, number, i))
            asked = [
                *opening,
                {"role": "assistant", "content": state},
                {"role": "user", "content": texts.fill(texts.critique, prompt, state, principle)},
            ]
            critique = await generate(asked, prompt, number, i, "critique")
            asked = [
                *asked,
                {"role": "assistant", "content": critique.text},
                {"role": "user", "content": texts.fill(texts.revision, prompt, state, principle)},
            ]
            revision = await generate(asked, prompt, number, i, "revision")
            proposal = inspect(revision, prompt, critique.text)
            async with aside():
                proposed = await score(proposal.text, prompt)
                if i == 1:
                    current = -math.inf if found.defect else (await first_score).value
                rejected = proposal.defect
                if not rejected:
                    rejected = UNSCORED if proposed.value is None else await veto(proposal.text, found.text)
            if not rejected and not rule(current, proposed.value, dice(prompt.id, number, i)):
                rejected = NOT_COMPARABLE if current is None else NOT_BETTER
            if not rejected:
                state, current = proposal.text, proposed.value
            done.append(Step(i, critique.text, proposal.text, proposed, proposal.defect, rejected, proposal.raw))
        return Chain(prompt.id, number, found.text, await first_score, found.defect, tuple(done), found.raw)
    finally:
        first_score.cancel()
