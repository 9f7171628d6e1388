"""One self-critique chain. Answers a prompt, criticises the answer, revises it, and keeps the revision if it is clean,
scored, and the acceptance rule says so. Does not know where text comes from, what is clean or how it is scored: all three
are handed in, and so are the dice. arXiv:2312.01957.

    x0 ~ p(x|c)      then, step by step:  z ~ p(z|x,c),  x' ~ p(x|z,x,c),  x <- x' or stay
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from dsc_hub.acceptance import Rule
from dsc_hub.hygiene import Finding
from dsc_hub.records import Chain, Prompt, Role, Score, Step, Turn

Message = dict[str, str]
Generate = Callable[[list[Message], Prompt, int, int, Role], Awaitable[Turn]]  # messages, prompt, chain, step, role
ScoreText = Callable[[str], Awaitable[Score]]
Inspect = Callable[[Turn, Prompt, str], Finding]  # what was written, for which prompt, after which critique ("": none)
Dice = Callable[[str, int, int], float]  # prompt id, chain, step -> u in [0, 1)

NOT_BETTER = "not accepted by the rule"
UNSCORED = "unscored"


def seed_of(run_seed: int, prompt_id: str, chain: int, step: int, what: str) -> int:
    """Seed of one request, 0 <= seed < 2**31: depends on what is asked alone, not on order, batch, replica or resumption."""
    key = f"{run_seed}/{prompt_id}/{chain}/{step}/{what}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def dice_of(run_seed: int) -> Dice:
    """The acceptance dice of a run: u in [0, 1) by (prompt, chain, step)."""
    return lambda prompt_id, chain, step: seed_of(run_seed, prompt_id, chain, step, "accept") / 2**31


@dataclass(frozen=True, slots=True)
class Texts:
    """What the model is asked: the system message if any, and the two requests with {prompt}, {answer} and {group}."""

    critique: str
    revision: str
    system: str | None = None

    def opening(self, prompt: str) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": prompt}]

    @staticmethod
    def fill(template: str, prompt: Prompt, answer: str) -> str:
        """All placeholders at once, so that braces in a prompt or in model text are never taken for placeholders."""
        parts = {"{prompt}": prompt.text, "{answer}": answer, "{group}": prompt.group}
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
) -> Chain:
    """Run one chain of `steps` critiques and revisions and return it whole.

    A first answer that is dirty or unscored has reward -inf: any clean, scored revision is then better. A revision that is
    dirty or unscored never becomes the state, whatever the rule.
    """
    opening = texts.opening(prompt.text)
    first = await generate(opening, prompt, number, 0, "answer")
    found = inspect(first, prompt, "")
    first_score = await score(found.text)
    state = found.text
    current = -math.inf if found.defect or first_score.value is None else first_score.value
    done: list[Step] = []
    for i in range(1, steps + 1):
        asked = [
            *opening,
            {"role": "assistant", "content": state},
            {"role": "user", "content": texts.fill(texts.critique, prompt, state)},
        ]
        critique = await generate(asked, prompt, number, i, "critique")
        asked = [
            *asked,
            {"role": "assistant", "content": critique.text},
            {"role": "user", "content": texts.fill(texts.revision, prompt, state)},
        ]
        revision = await generate(asked, prompt, number, i, "revision")
        proposal = inspect(revision, prompt, critique.text)
        proposed = await score(proposal.text)
        rejected = proposal.defect
        if not rejected and proposed.value is None:
            rejected = UNSCORED
        elif not rejected and not rule(current, proposed.value, dice(prompt.id, number, i)):
            rejected = NOT_BETTER
        if not rejected:
            state, current = proposal.text, proposed.value
        done.append(Step(i, critique.text, proposal.text, proposed, proposal.defect, rejected, proposal.raw))
    return Chain(prompt.id, number, found.text, first_score, found.defect, tuple(done), found.raw)
