"""Run all chains of the training and validation prompts: prompts in, rows of turns.jsonl and chains.jsonl out.

Every chain is a coroutine that asks for its next turn as soon as it has the last one; a bound on those in flight keeps the
server's batch full. A finished turn is on disk at once, so a killed run asks again only for what was in flight. Neither prompts
nor texts of finished chains are held in memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dsc_hub.acceptance import make_rule
from dsc_hub.chain.chain import (
    Message,
    ScoreText,
    Texts,
    VetoText,
    dice_of,
    no_veto,
    run_chain,
    seed_of,
)
from dsc_hub.chain.hygiene import inspect
from dsc_hub.config.recipe import Recipe
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.client import Completion, RequestFailed
from dsc_hub.inference.concurrency import FIRST
from dsc_hub.inference.task_pool import TaskPool, raise_if_stopped
from dsc_hub.records import Chain, Prompt, Role, Turn, from_row
from dsc_hub.runs.jsonl import JsonlFile
from dsc_hub.runs.row_index import Key, OrderedRows, RowIndex, chain_key, request_key
from dsc_hub.runs.run import Run
from dsc_hub.system.files import write_lines
from dsc_hub.system.hashing import digest
from dsc_hub.system.progress import Meter, moving_line, say

Complete = Callable[[list[Message], int], Awaitable[Completion]]  # messages, seed
MOST_FAILURES_IN_A_ROW = 20  # then it isn't the requests but the server
MOST_REFUSALS_IN_A_ROW = 200  # of different prompts, by a server that has answered before


class CircuitBreaker:
    """Tells requests that fail for their own sake from a server that fails all of them: so many with no answer between them. Of
    refusals those of one prompt count once. `formerly`: what failed in an earlier session says nothing new. `works`: did the
    server answer then?"""

    def __init__(self, formerly: Container[Key], works: bool) -> None:
        self._formerly, self._works = formerly, works
        self._failed, self._refused = set[Key](), set[str]()

    def answered(self) -> None:
        self._works = True
        self._failed.clear()
        self._refused.clear()

    def failed(self, key: Key, error: RequestFailed, hint: str = "") -> None:
        """The request of this key (of a prompt's id, and a number) failed. ServingError if that is one too many."""
        if key in self._formerly:
            return
        if error.refused:
            self._refused.add(key[0])
        else:
            self._failed.add(key)
        most = MOST_REFUSALS_IN_A_ROW if self._works else MOST_FAILURES_IN_A_ROW
        if len(self._failed) >= MOST_FAILURES_IN_A_ROW or len(self._refused) >= most:
            n = len(self._failed) + len(self._refused)
            raise ServingError(f"{n} requests failed one after the other; the last: {error}", hint) from None


@dataclass
class SamplingProgress:
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
    interrupted: bool = False
    meter: Meter = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.meter = Meter(self.total * self.turns - self.reused_turns)

    def chain_done(self, chain: Chain) -> None:
        self.finished += 1
        self.proposals += len(chain.steps)
        self.accepted += sum(s.accepted for s in chain.steps)
        self.unscored += (chain.answer_score.value is None) + sum(s.score.value is None for s in chain.steps)

    def line(self) -> str:
        """What the moving line says now."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        share = f" ({self.accepted / self.proposals:.0%})" if self.proposals else ""
        return (
            f"chains {self.finished + self.failed}/{self.total}  failed {self.failed}  revisions accepted "
            f"{self.accepted}/{self.proposals}{share}  unscored {self.unscored}  {self.new_tokens / seconds:.0f} tokens/s{self.meter.left()}"
        )


def planned_chains(prompts: Iterable[Prompt], chains_per_prompt: int) -> Iterator[tuple[Prompt, int]]:
    """All chains that prompts ask for."""
    return ((p, n) for p in prompts for n in range(chains_per_prompt))


async def sample(
    run: Run,
    recipe: Recipe,
    prompts: Iterable[Prompt],
    complete: Complete,
    score: ScoreText,
    *,
    veto: VetoText = no_veto,
    criticise: Complete | None = None,
    known: RowIndex | None = None,
    prefix: str = "",
    reused: Counter[str] | None = None,
    level: Callable[[], int] | None = None,
    show: Callable[[Callable[[], str]], None] = lambda text: None,
) -> SamplingProgress:
    """Run what is left of the chains and append their rows (`<prefix>turns.jsonl`, `<prefix>chains.jsonl`).

    `prompts` are gone through twice and not held. `criticise` is asked for the critiques (None: as for the rest). `known` holds
    turns of other runs by request and seed: what was asked there is not asked again; `reused` counts its {tokens}. `level` says how
    many requests should be in flight (None: the recipe's number).

    Chains that fail for their own sake go to failed.jsonl with the reason and are tried again by the next run. Raises
    ServingError when the server is gone or refuses one request after the other. After Ctrl-C (flow.py) the tally says `interrupted`.
    """
    turns, chains, failed = (run.rows(f"{prefix}{name}.jsonl") for name in ("turns", "chains", "failed"))
    finished, each = RowIndex([chains], chain_key), recipe.chain.chains_per_prompt
    formerly = RowIndex([failed], chain_key)  # tried again now
    left = sum(key not in finished for p in prompts for key in ((p.id, n) for n in range(each)))
    # Only turns of unfinished chains are held: those of finished ones are never asked for again.
    had = {t.key: t for t in _turns_outside(turns, finished)}
    tally = SamplingProgress(left, 1 + 2 * recipe.chain.steps, reused_turns=len(had))
    c = recipe.chain
    texts = Texts(c.critique, c.revision, c.system, c.principles)
    principle_dice = dice_of(recipe.seed, "principle")
    rule, dice = make_rule(recipe.chain.acceptance, recipe.chain.temperature), dice_of(recipe.seed)
    flow, failures = (
        TaskPool(level or (lambda: fixed_level(recipe))),
        CircuitBreaker(formerly, works=bool(finished or had)),
    )
    reused = Counter() if reused is None else reused

    async def generate(messages: list[Message], prompt: Prompt, number: int, step: int, role: Role) -> Turn:
        seed, request = seed_of(recipe.seed, prompt.id, number, step, role), digest(role, messages)
        old = had.pop((prompt.id, number, step, role), None)
        if old is not None and old.request in ("", request):  # not what answers a text that is no longer there
            return old
        if known is not None and (other := known.get((request, seed))) is not None:
            turn = replace(from_row(Turn, other), prompt_id=prompt.id, chain=number, step=step, role=role)
            tally.reused_turns += 1
            reused["tokens"] += turn.new_tokens
        else:
            raise_if_stopped()
            ask = criticise if criticise and role == "critique" else complete
            c = await ask(messages, seed)
            turn = Turn(
                prompt.id, number, step, role, c.text, c.finish_reason, c.prompt_tokens, c.new_tokens, seed, request
            )
            tally.new_tokens += c.new_tokens
            failures.answered()
        turns.append(turn)
        tally.meter.done += 1
        show(tally.line)
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
                aside=flow.aside,
            )
        except RequestFailed as e:
            failed.append({"prompt_id": prompt.id, "number": number, "reason": str(e)})
            tally.failed += 1
            hint = f"See {failed.path}; run the same command again when the cause is gone."
            failures.failed((prompt.id, number), e, hint)
            return
        chains.append(chain)
        tally.chain_done(chain)
        show(tally.line)

    todo = ((p, n) for p, n in planned_chains(prompts, each) if (p.id, n) not in finished)
    try:
        async for _ in flow.over((lambda p=p, n=n: one(p, n)) for p, n in todo):
            pass
    except KeyboardInterrupt:
        tally.interrupted = True
    finally:
        for rows in (turns, chains, failed):
            rows.close()
    _drop_finished(failed, chains)
    return tally


def _drop_finished(failed: JsonlFile, chains: JsonlFile) -> None:
    """Of what failed, keep the last reason of each chain that is still not finished. Not before the end: a session that is broken
    off must not lose what it knew."""
    if failed.path.exists():
        finished = RowIndex([chains], chain_key)
        left = RowIndex([failed], lambda row: None if chain_key(row) in finished else chain_key(row))
        if left:
            write_lines(failed.path, left.lines())
        else:
            failed.path.unlink()


def fixed_level(recipe: Recipe) -> int:
    """Requests in flight where nobody measures how many are best."""
    given = recipe.serving.concurrency
    limits = given if isinstance(given, tuple) else (given,)
    return sum(FIRST if limit == "auto" else limit for limit in limits)


def _turns_outside(turns: JsonlFile, finished: RowIndex) -> Iterator[Turn]:
    """The turns of chains that are not finished."""
    for at, row in turns.placed():
        if (str(row.get("prompt_id")), row.get("chain", 0)) not in finished:
            yield turns.typed(Turn, at, row)


async def run_with_line(
    run: Run,
    recipe: Recipe,
    prompts: Iterable[Prompt],
    complete: Complete,
    score: ScoreText,
    **more: Any,
) -> SamplingProgress:
    """`sample` with the moving line on the terminal."""
    with moving_line() as line:
        return await sample(run, recipe, prompts, complete, score, show=line.show, **more)


def turns_of_others(run: Run, others: Iterable[Run]) -> RowIndex:
    """Turns that other runs got from the same model with the same settings, by request and seed: a chain of more
    steps, or under another rule, begins with the same requests."""

    def way(facts: Mapping[str, Any]) -> Any:
        recipe, of = facts["recipe"], ("endpoints", "served_model", "context")
        served = [recipe["serving"][key] for key in of]
        settings = {k: v for k, v in recipe["generation"].items() if v != {}}  # `extra`, which older runs don't know
        return [facts["identity"]["model"], settings, served, recipe["chain"].get("critic")]

    found: list[JsonlFile] = []
    mine = way(run.facts)
    for other in others:
        rows = other.rows("turns.jsonl")
        try:
            if other.folder != run.folder and rows.path.exists() and way(other.facts) == mine:
                for _ in rows.as_type(Turn):
                    pass
                found.append(rows)
        except (RunError, LookupError, TypeError) as e:  # its damage is no business of this run
            say(
                f"sampling  {other.folder.name} can't be read, nothing is taken from it: {' '.join(str(e).split())[:150]}"
            )
    return RowIndex(found, request_key)


def read_chains(run: Run, name: str = "chains.jsonl") -> OrderedRows[Chain]:
    """All finished chains, in the order of their keys: the order of finishing is an accident of timing."""
    return OrderedRows(run.rows(name), Chain, chain_key)
