"""Run all chains of the training and validation prompts: prompts in, rows of turns.jsonl and chains.jsonl out.

Every chain is a coroutine that asks for its next turn as soon as it has the last one; a bound on those in flight keeps the
server's batch full. A finished turn is on disk at once, so a killed run asks again only for what was in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from dsc_hub import stats
from dsc_hub.acceptance import make_rule
from dsc_hub.chain import (
    BY_VETO,
    NOT_BETTER,
    UNSCORED,
    Message,
    ScoreText,
    Texts,
    VetoText,
    dice_of,
    no_veto,
    run_chain,
    seed_of,
)
from dsc_hub.errors import RunError, ServingError
from dsc_hub.generation import Completion, RequestFailed
from dsc_hub.hygiene import inspect
from dsc_hub.progress import Meter, moving_line, say
from dsc_hub.recipe import Recipe, digest
from dsc_hub.records import Chain, Prompt, Role, Turn
from dsc_hub.runs import Run

Complete = Callable[[list[Message], int], Awaitable[Completion]]  # messages, seed
MOST_FAILURES_IN_A_ROW = 20  # then it isn't the requests but the server


@dataclass
class Tally:
    """What the progress line counts. finished + failed + left = total. Time left goes by turns: chains finish late."""

    total: int
    turns: int  # a chain
    finished: int = 0
    failed: int = 0
    accepted: int = 0
    proposals: int = 0
    unscored: int = 0
    new_tokens: int = 0
    reused_turns: int = 0
    failures_in_a_row: int = 0
    meter: Meter = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.meter = Meter(self.total * self.turns - self.reused_turns)

    def chain_done(self, chain: Chain) -> None:
        self.finished += 1
        self.failures_in_a_row = 0
        self.proposals += len(chain.steps)
        self.accepted += sum(s.accepted for s in chain.steps)
        self.unscored += (chain.answer_score.value is None) + sum(s.score.value is None for s in chain.steps)

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        share = f" ({self.accepted / self.proposals:.0%})" if self.proposals else ""
        return (
            f"chains {self.finished + self.failed}/{self.total}  failed {self.failed}  revisions accepted "
            f"{self.accepted}/{self.proposals}{share}  unscored {self.unscored}  {self.new_tokens / seconds:.0f} tokens/s{self.meter.left()}"
        )


def wanted(prompts: Iterable[Prompt], chains_per_prompt: int) -> list[tuple[Prompt, int]]:
    """All chains that a list of prompts asks for."""
    return [(p, n) for p in prompts for n in range(chains_per_prompt)]


async def sample(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    complete: Complete,
    score: ScoreText,
    *,
    veto: VetoText = no_veto,
    criticise: Complete | None = None,
    known: Mapping[tuple[str, int], Turn] = MappingProxyType({}),
    prefix: str = "",
    show: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Run what is left of the chains and append their rows (`<prefix>turns.jsonl`, `<prefix>chains.jsonl`).

    `criticise` is asked for the critiques (None: as for the rest). `known` holds turns of other runs by request and seed: what was
    asked there is not asked again.

    Chains that fail for their own sake go to failed.jsonl with the reason and are tried again by the next run. Raises
    ServingError when the server is gone or refuses one request after the other.
    """
    turns, chains, failed = (run.rows(f"{prefix}{name}.jsonl") for name in ("turns", "chains", "failed"))
    finished = {c.key for c in chains.as_type(Chain)}
    todo = [(p, n) for p, n in wanted(prompts, recipe.chain.chains_per_prompt) if (p.id, n) not in finished]
    # Only turns of unfinished chains are held: those of finished ones are never asked for again.
    had = {t.key: t for t in turns.as_type(Turn) if (t.prompt_id, t.chain) not in finished}
    tally = Tally(len(todo), 1 + 2 * recipe.chain.steps, reused_turns=len(had))
    c = recipe.chain
    texts = Texts(c.critique, c.revision, c.system, c.principles)
    principle_dice = dice_of(recipe.seed, "principle")
    rule, dice = make_rule(recipe.chain.acceptance, recipe.chain.temperature), dice_of(recipe.seed)

    async def generate(messages: list[Message], prompt: Prompt, number: int, step: int, role: Role) -> Turn:
        if (old := had.get((prompt.id, number, step, role))) is not None:
            return old
        seed, request = seed_of(recipe.seed, prompt.id, number, step, role), digest(role, messages)
        if (other := known.get((request, seed))) is not None:
            turn = replace(other, prompt_id=prompt.id, chain=number, step=step, role=role)
            tally.reused_turns += 1
        else:
            ask = criticise if criticise and role == "critique" else complete
            c = await ask(messages, seed)
            turn = Turn(
                prompt.id, number, step, role, c.text, c.finish_reason, c.prompt_tokens, c.new_tokens, seed, request
            )
            tally.new_tokens += c.new_tokens
        turns.append(asdict(turn))
        tally.meter.done += 1
        show(tally.line())
        return turn

    async def one(prompt: Prompt, number: int) -> None:
        try:
            chain = await run_chain(
                prompt,
                number,
                texts=texts,
                steps=recipe.chain.steps,
                generate=generate,
                score=score,
                rule=rule,
                dice=dice,
                veto=veto,
                principle_dice=principle_dice,
                inspect=lambda turn, about, critique: inspect(
                    turn.text, turn.finish_reason, about, critique, recipe.hygiene
                ),
            )
        except RequestFailed as e:
            failed.append({"prompt_id": prompt.id, "number": number, "reason": str(e)})
            tally.failed += 1
            tally.failures_in_a_row += 1
            if tally.failures_in_a_row >= MOST_FAILURES_IN_A_ROW:
                raise ServingError(
                    f"{MOST_FAILURES_IN_A_ROW} chains failed one after the other; the last: {e}",
                    f"See {failed.path}; run the same command again when the cause is gone.",
                ) from None
            return
        chains.append(chain.as_row())
        tally.chain_done(chain)
        show(tally.line())

    try:
        async for _ in in_flight((lambda p=p, n=n: one(p, n) for p, n in todo), recipe.serving.concurrency):
            pass
    finally:
        for rows in (turns, chains, failed):
            rows.close()
    return tally


async def in_flight(jobs: Iterable[Callable[[], Awaitable[Any]]], most: int) -> AsyncIterator[Any]:
    """Run jobs with at most `most` at once and yield their results as they come; the first error ends all of them."""
    running: set[asyncio.Task[Any]] = set()
    done: set[asyncio.Task[Any]] = set()
    left = iter(jobs)
    try:
        while True:
            while len(running) < most and (job := next(left, None)) is not None:
                running.add(asyncio.ensure_future(job()))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        # `done` too: several may have failed at the same moment, and each error wants to be looked at.
        await asyncio.gather(*running, *done, return_exceptions=True)


async def run_with_line(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    complete: Complete,
    score: ScoreText,
    **more: Any,
) -> Tally:
    """`sample` with the moving line on the terminal."""
    with moving_line() as line:
        return await sample(run, recipe, prompts, complete, score, show=line.show, **more)


def turns_of_others(run: Run, others: Iterable[Run]) -> dict[tuple[str, int], Turn]:
    """Turns that other runs got from the same model with the same settings, by request and seed: a chain of more
    steps, or under another rule, begins with the same requests."""

    def way(facts: Mapping[str, Any]) -> Any:
        recipe, of = facts["recipe"], ("endpoints", "served_model", "context")
        served = [recipe["serving"][key] for key in of]
        return [facts["identity"]["model"], recipe["generation"], served, recipe["chain"].get("critic")]

    found: dict[tuple[str, int], Turn] = {}
    mine = way(run.facts)
    for other in others:
        try:
            if other.folder != run.folder and other["turns.jsonl"].exists() and way(other.facts) == mine:
                found |= {(t.request, t.seed): t for t in other.rows("turns.jsonl").as_type(Turn) if t.request}
        except (RunError, LookupError, TypeError) as e:  # its damage is no business of this run
            say(
                f"sampling  {other.folder.name} can't be read, nothing is taken from it: {' '.join(str(e).split())[:150]}"
            )
    return found


def read_chains(run: Run, name: str = "chains.jsonl") -> list[Chain]:
    """All finished chains, in the order of their keys: the order of finishing is an accident of timing."""
    return sorted(run.rows(name).as_type(Chain), key=lambda c: c.key)


def summary(chains: Sequence[Chain], groups: dict[str, str], total: int, steps: int) -> dict[str, Any]:
    """The numbers of the chains: rewards by step with intervals over groups, and where each proposal went.

    In every step proposals = accepted + sum of rejected; finished + failed = chains.
    """

    def clean(pairs: Iterable[tuple[str, float | None]]) -> dict[str, Any]:
        scored = [(v, groups[p]) for p, v in pairs if v is not None]
        return stats.estimate([v for v, _ in scored], [g for _, g in scored])

    def state(chain: Chain, step: int) -> float | None:
        kept = [s.score.value for s in chain.steps[:step] if s.accepted]
        return kept[-1] if kept else chain.answer_score.value

    by_step = []
    for i in range(1, steps + 1):
        at = [c.steps[i - 1] for c in chains]
        by_step.append(
            {
                "step": i,
                "proposals": len(at),
                "accepted": sum(s.accepted for s in at),
                "rejected": dict(Counter(s.rejected for s in at if s.rejected).most_common()),
                "reward_proposed": clean((c.prompt_id, c.steps[i - 1].score.value) for c in chains),
                "reward_state": clean((c.prompt_id, state(c, i)) for c in chains),
            }
        )
    return {
        "chains": total,
        "finished": len(chains),
        "failed": total - len(chains),
        "dirty_answers": sum(bool(c.answer_defect) for c in chains),
        "dirty_answers_by_reason": dict(Counter(c.answer_defect for c in chains if c.answer_defect).most_common()),
        "unscored": sum((c.answer_score.value is None) + sum(s.score.value is None for s in c.steps) for c in chains),
        "usable": sum(not c.final_defect for c in chains),
        "first_reward": clean((c.prompt_id, c.answer_score.value) for c in chains),
        "stripped": sum(bool(c.answer_raw) + sum(bool(s.raw) for s in c.steps) for c in chains),
        "steps": by_step,
    }


def waterfall(numbers: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What became of the texts, from `summary`: (what, how many); losses are negative and add up to what follows them."""
    losses: Counter[str] = Counter()
    for step in numbers["steps"]:
        losses.update(step["rejected"])
    later = (UNSCORED, *BY_VETO, NOT_BETTER)  # what happens to clean revisions
    dirty = sum(losses[r] for r in losses if r not in later)
    proposals = sum(s["proposals"] for s in numbers["steps"])
    return [
        ("first answers", numbers["finished"]),
        *((reason, -n) for reason, n in numbers["dirty_answers_by_reason"].items()),
        ("clean first answers", numbers["finished"] - numbers["dirty_answers"]),
        ("revisions proposed", proposals),
        *((reason, -n) for reason, n in losses.most_common() if reason not in later),
        ("clean revisions", proposals - dirty),
        *((reason, -losses[reason]) for reason in later if losses[reason]),
        ("accepted revisions", sum(s["accepted"] for s in numbers["steps"])),
        ("chains", numbers["finished"]),
        ("without a clean final state", numbers["usable"] - numbers["finished"]),
        ("chains with a clean final state", numbers["usable"]),
    ]
