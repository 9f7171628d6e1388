"""Run all chains of the training and validation prompts: prompts in, rows of turns.jsonl and chains.jsonl out.

Every chain is a coroutine that requests its next turn as soon as it has the previous one; a limit on the requests in
flight keeps the server's batch full. A finished turn is written to disk at once, so a killed run repeats only the
requests that were in flight. Neither prompts nor texts of finished chains are held in memory.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from dsc_hub.acceptance import make_rule
from dsc_hub.chain.chain import ScoreText, VetoText, dice_of, draw_evenly, no_veto, run_chain, seed_of, texts_of
from dsc_hub.chain.hygiene import Finding, inspect
from dsc_hub.config.recipe import Recipe, chain_seed
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.client import Completion
from dsc_hub.inference.concurrency import FIRST
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.inference.task_pool import TaskPool, raise_if_stopped
from dsc_hub.records import Chain, Message, Prompt, Role, Tool, Turn, from_row
from dsc_hub.runs.cost import TAKEN_OVER
from dsc_hub.runs.jsonl import JsonlFile
from dsc_hub.runs.row_index import Key, OrderedRows, RowIndex, chain_key, request_key
from dsc_hub.runs.run import Run
from dsc_hub.sampling.progress import SamplingProgress
from dsc_hub.sampling.schedule import ROWS, Ending, Schedule
from dsc_hub.system.files import write_lines
from dsc_hub.system.hashing import digest
from dsc_hub.system.progress import moving_line, say

Complete = Callable[..., Awaitable[Completion]]  # messages, seed; tools if the prompt has some (`tools_of`)
MOST_FAILURES_IN_A_ROW = 20  # consecutive failures that count as a failure of the server
MOST_REFUSALS_IN_A_ROW = 200  # refusals of different prompts, by a server that has answered before


class CircuitBreaker:
    """Circuit breaker: raises ServingError after too many consecutive failures.

    Refusals of the same prompt count once; failures that the client found to be the request's own fault do not count.
    `formerly` holds the keys that failed in an earlier session; their failures are ignored. `works`: whether the server
    answered in an earlier session.
    """

    def __init__(self, formerly: RowIndex | Collection[Key], works: bool) -> None:
        self._formerly, self._works = formerly, works
        self._failed, self._refused = set[Key](), set[str]()

    def answered(self) -> None:
        self._works = True
        self._failed.clear()
        self._refused.clear()

    def failed(self, key: Key, error: RequestFailed, hint: str = "") -> None:
        """Record a failed request by its key (prompt id, number). ServingError if the limit is reached."""
        if key in self._formerly:
            return
        if error.others_answered:
            self.answered()
            return
        if error.refused:
            self._refused.add(key[0])
        else:
            self._failed.add(key)
        most = MOST_REFUSALS_IN_A_ROW if self._works else MOST_FAILURES_IN_A_ROW
        if len(self._failed) >= MOST_FAILURES_IN_A_ROW or len(self._refused) >= most:
            n = len(self._failed) + len(self._refused)
            raise ServingError(f"{n} requests failed one after the other; the last: {error}", hint) from None


def tools_of(prompt: Prompt) -> dict[str, Sequence[Tool]]:
    """Return {tools} for the requests about a prompt; {} if it has none."""
    return {"tools": prompt.tools} if prompt.tools else {}


def planned_chains(prompts: Iterable[Prompt], chains_per_prompt: int) -> Iterator[tuple[Prompt, int]]:
    """Yield (prompt, chain index) for all chains of the prompts."""
    return ((p, n) for p in prompts for n in range(chains_per_prompt))


@dataclass
class _Session:
    """What the chains of one session share: where turns come from, how texts are judged, and where rows go."""

    recipe: Recipe
    turns: JsonlFile
    chains: JsonlFile
    failed: JsonlFile
    stored_turns: dict[tuple[str, int, int, str], Turn]  # of unfinished chains, from earlier sessions
    known: RowIndex | None  # turns of other runs, by request and seed
    complete: Complete
    criticise: Complete
    score: ScoreText
    veto: VetoText
    pool: TaskPool
    progress: SamplingProgress
    failures: CircuitBreaker
    reused: Counter[str]
    schedule: Schedule | None
    show: Callable[[Callable[[], str]], None]

    def __post_init__(self) -> None:
        chain, self._seed = self.recipe.chain, chain_seed(self.recipe)
        self._texts = texts_of(chain)
        evenly = draw_evenly(self._seed, len(self._texts.pairs))
        self._choose = evenly if self.schedule is None else self.schedule.choose
        self._rule = make_rule(chain.acceptance, chain.temperature)
        self._dice, self._principle_dice = dice_of(self._seed), dice_of(self._seed, "principle")

    async def generate(self, messages: list[Message], prompt: Prompt, number: int, step: int, role: Role) -> Turn:
        """Return the turn of a request: an earlier session's, another run's, or a new one; append it if it is not
        stored yet."""
        self.progress.left.ask((prompt.id, number))
        seed, tools = seed_of(self._seed, prompt.id, number, step, role), tools_of(prompt)
        request = digest(role, messages, *tools.values())
        old = self.stored_turns.pop((prompt.id, number, step, role), None)
        if old is not None and old.request in ("", request):  # skip a turn that answers an outdated text
            return old
        if self.known is not None and (other := self.known.get((request, seed))) is not None:
            turn = replace(from_row(Turn, other), prompt_id=prompt.id, chain=number, step=step, role=role)
            self.progress.reused_turns += 1
            self.reused["tokens"] += turn.new_tokens
            # A budget is not charged for it; without one the row is as its run wrote it.
            self.turns.append(turn if self.schedule is None else asdict(turn) | {TAKEN_OVER: True})
        else:
            raise_if_stopped()
            c = await (self.criticise if role == "critique" else self.complete)(messages, seed, **tools)
            turn = Turn(
                prompt.id,
                number,
                step,
                role,
                c.text,
                c.finish_reason,
                c.prompt_tokens,
                c.new_tokens,
                seed,
                request,
                c.thought,
            )
            self.progress.new_tokens += c.new_tokens
            if self.schedule is not None:
                self.schedule.used((prompt.id, number), c.new_tokens)
            self.failures.answered()
            self.turns.append(turn)
        self.progress.meter.done += 1
        self.show(self.progress.line)
        return turn

    async def run_one(self, prompt: Prompt, number: int) -> None:
        """Run one chain and append it, or the reason of its failure."""
        try:
            chain = await self._run_chain(prompt, number)
        except RequestFailed as e:
            self.failed.append({"prompt_id": prompt.id, "number": number, "reason": str(e)})
            self.progress.chain_failed((prompt.id, number))
            if self.schedule is not None:
                self.schedule.failed((prompt.id, number))
            hint = f"See {self.failed.path}; run the same command again when the cause is gone."
            self.failures.failed((prompt.id, number), e, hint)
            return
        self.chains.append(chain.as_row())
        self.progress.chain_done(chain)
        if self.schedule is not None:
            self.schedule.finished(chain)
            self.progress.expect(self.schedule)
        self.show(self.progress.line)

    async def _run_chain(self, prompt: Prompt, number: int) -> Chain:
        return await run_chain(
            prompt,
            number,
            texts=self._texts,
            steps=self.recipe.chain.steps,
            generate=self.generate,
            score=self.score,
            rule=self._rule,
            dice=self._dice,
            veto=self.veto,
            principle_dice=self._principle_dice,
            inspect=self._inspect,
            aside=self.pool.aside,
            good_enough=self.recipe.chain.good_enough,
            choose=self._choose,
        )

    def _inspect(self, turn: Turn, prompt: Prompt, critique: str) -> Finding:
        return inspect(turn.text, turn.finish_reason, prompt, critique, self.recipe.hygiene)


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
    schedule: Schedule | None = None,
    prefix: str = "",
    reused: Counter[str] | None = None,
    level: Callable[[], int] | None = None,
    scoring_s: Callable[[], float] = float,
    show: Callable[[Callable[[], str]], None] = lambda text: None,
) -> SamplingProgress:
    """Run the unfinished chains and append their rows (`<prefix>turns.jsonl`, `<prefix>chains.jsonl`).

    `prompts` is iterated twice and not held in memory. `criticise` generates the critiques (None: `complete` does).
    `known` indexes turns of other runs by request and seed, which are reused; `reused` counts their {tokens}.
    `schedule` decides which chains are run, and when it has ended; None: all chains of all prompts. `level`
    returns the number of requests to keep in flight (None: the recipe's number), `scoring_s` the seconds that the
    scorer has worked.

    Chains that fail individually are written to failed.jsonl and retried by the next run. ServingError if the server is
    unreachable or refuses one request after the other. After Ctrl-C (task_pool.py) `interrupted` is set.
    """
    turns, chains, failed = (run.rows(f"{prefix}{name}.jsonl") for name in ("turns", "chains", "failed"))
    finished, each = RowIndex([chains], chain_key), recipe.chain.chains_per_prompt
    if schedule is None:
        pending = sum(key not in finished for p in prompts for key in ((p.id, n) for n in range(each)))
    else:
        schedule.resume(chains.as_type(Chain))
        pending = max(0, schedule.expected - schedule.before)
    # Only turns of unfinished chains are held: those of finished chains are not needed again.
    stored_turns = {t.key: t for t in _turns_outside(turns, finished)}
    session = _Session(
        recipe,
        turns,
        chains,
        failed,
        stored_turns,
        known,
        complete,
        criticise or complete,
        score,
        veto,
        pool=TaskPool(level or (lambda: fixed_level(recipe))),
        progress=SamplingProgress(pending, 1 + 2 * recipe.chain.steps, scoring_s, reused_turns=len(stored_turns)),
        failures=CircuitBreaker(RowIndex([failed], chain_key), works=bool(finished or stored_turns)),
        reused=Counter() if reused is None else reused,
        schedule=schedule,
        show=show,
    )
    todo: Iterable[tuple[Prompt, int] | None] = schedule or (
        (p, n) for p, n in planned_chains(prompts, each) if (p.id, n) not in finished
    )
    jobs = (None if key is None else partial(session.run_one, *key) for key in todo)
    try:
        async with contextlib.aclosing(session.pool.over(jobs)) as results:
            async for _ in results:
                if schedule is not None and schedule.ended == ROWS:
                    break  # chains in flight are behind those that were needed
    except KeyboardInterrupt:
        session.progress.interrupted = True
    else:
        session.progress.interrupted = session.pool.stopping  # the rows were reached while requests were finished
    finally:
        for rows in (turns, chains, failed):
            rows.close()
    if schedule is None or not schedule.ended:
        _drop_finished(failed, chains)
        return session.progress
    counting = RowIndex([chains], lambda row: None if schedule.is_superfluous(chain_key(row)) else chain_key(row))
    if len(counting) < len(RowIndex([chains], chain_key)):
        write_lines(chains.path, counting.lines())
    _drop_finished(failed, chains, schedule.is_superfluous)
    counted = sum(len(RowIndex([rows], chain_key)) for rows in (chains, failed))
    session.progress.ending = Ending(schedule.ended, counted)
    return session.progress


def _drop_finished(
    failed: JsonlFile, chains: JsonlFile, is_superfluous: Callable[[Key], bool] = lambda key: False
) -> None:
    """Reduce failed.jsonl to the last reason of each chain that is still unfinished, and not superfluous.

    Called only at the end of a session, so that an interrupted session loses no records.
    """
    if failed.path.exists():
        finished = RowIndex([chains], chain_key)

        def key_of(row: Mapping[str, Any]) -> Key | None:
            key = chain_key(row)
            return None if key in finished or is_superfluous(key) else key

        remaining = RowIndex([failed], key_of)
        if remaining:
            write_lines(failed.path, remaining.lines())
        else:
            failed.path.unlink()


def fixed_level(recipe: Recipe) -> int:
    """Return the number of requests in flight when it is not tuned at run time."""
    setting = recipe.serving.concurrency
    limits = setting if isinstance(setting, tuple) else (setting,)
    return sum(FIRST if limit == "auto" else limit for limit in limits)


def _turns_outside(turns: JsonlFile, finished: RowIndex) -> Iterator[Turn]:
    """Yield the turns of unfinished chains."""
    for at, row in turns.with_offsets():
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
    """Run `sample` with a progress line on the terminal."""
    with moving_line() as line:
        return await sample(run, recipe, prompts, complete, score, show=line.show, **more)


def turns_of_others(run: Run, others: Iterable[Run]) -> RowIndex:
    """Index the turns that other runs generated with the same model and settings, by request and seed.

    A chain with more steps, or with another acceptance rule, begins with the same requests.
    """

    def way(facts: Mapping[str, Any]) -> Any:
        recipe, keys = facts["recipe"], ("endpoints", "served_model", "context")
        served = [recipe["serving"][key] for key in keys]
        # older runs lack what is newer
        settings = {k: v for k, v in recipe["generation"].items() if v not in ({}, None)}
        critic = dict(recipe["chain"].get("critic") or {}) | {"price": None}
        # Before critics had parameters of their own, they got those of the base.
        critic["extra"] = critic.get("extra", recipe["generation"].get("extra", {}) if len(critic) > 1 else {})
        return [facts["identity"]["model"], settings, served, critic]

    files: list[JsonlFile] = []
    settings_here = way(run.raw_facts)
    for other in others:
        rows = other.rows("turns.jsonl")
        try:
            if other.folder != run.folder and rows.path.exists() and way(other.raw_facts) == settings_here:
                for _ in rows.as_type(Turn):
                    pass
                files.append(rows)
        except (RunError, LookupError, TypeError) as e:  # a damaged sibling must not stop this run
            say(
                f"sampling  {other.folder.name} can't be read, nothing is taken from it: "
                f"{' '.join(str(e).split())[:150]}"
            )
    return RowIndex(files, request_key)


def read_chains(run: Run, name: str = "chains.jsonl") -> OrderedRows[Chain]:
    """Return all finished chains in key order; the order in which they finished depends on timing."""
    return OrderedRows(run.rows(name), Chain, chain_key)
