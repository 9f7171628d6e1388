"""The arms of an evaluation: the methods under comparison answer the same prompts with the same seeds.

    base            one plain answer of the base: the student, or without one the model that writes the chains
    self_critique   the chain at test time: its final state
    best_of_n       the highest-reward answer of n answers of the base; n is chosen to match the chain's token cost
    distilled       one plain answer of the base with the adapter
    distilled_self_critique   the chain with the adapter
    teacher         one plain answer of the model that writes the chains, where a student is trained
    teacher_self_critique     the chain with it

The adapter is served beside its base; all arms of one model run before those of the other. The first answer of every
arm is the same request as the plain arm of its model, so it is generated once. answers.py scores the answers,
summary.py computes the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import ScoreText, VetoText, no_veto, seed_of, texts_of
from dsc_hub.chain.hygiene import inspect
from dsc_hub.config.arms import ADAPTER, ARMS, Arm, models_of, name_at_server
from dsc_hub.config.recipe import Recipe
from dsc_hub.errors import ServingError
from dsc_hub.inference.client import Completion
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.inference.task_pool import TaskPool
from dsc_hub.records import Prompt, Turn
from dsc_hub.runs.run import Run
from dsc_hub.sampling.progress import SamplingProgress
from dsc_hub.sampling.sample import (
    CircuitBreaker,
    Complete,
    fixed_level,
    read_chains,
    run_with_line,
    tools_of,
)
from dsc_hub.system.progress import Meter, moving_line, say

CompleteAs = Callable[..., Awaitable[Completion]]  # messages, seed, name (None: the server's); tools as in `Complete`
MORE_ANSWERS = "best_of_n.turns.jsonl"  # after the prefix of an arm: its model's answers after the first
CHECKED_TEXTS = 5  # by `check_adapter_acts`
# One text per line, unrelated to the topics of recipes.
NEUTRAL = Path(__file__).parent.parent / "metrics" / "neutral.txt"


async def answer_all(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    generator: Any,
    score: ScoreText,
    veto: VetoText,
    models: Sequence[str | None],
    beside_base: bool = False,
) -> dict[str, dict[str, float]]:
    """Run `answer_prompts` with a `Generator`, then measure the surprise of the neutral texts.

    `beside_base`: the server has the adapter beside its base, so whether it applies it is checked first. Return nats
    per token by arm and text; an arm's mapping is empty if the server reports no prompt log-probabilities.
    """
    texts = neutral_texts()
    if beside_base and ADAPTER in models:
        await check_adapter_acts(generator, texts)
    await answer_prompts(
        run, recipe, prompts, generator.complete, score, veto, models, generator.criticise, generator.level
    )
    out: dict[str, dict[str, float]] = {}
    for name in recipe.evaluation.arms:
        if ARMS[name].way == "answer" and ARMS[name].model in models:
            out[name] = {}
            for text in texts:
                try:
                    nats = await generator.surprise(text, name_at_server(ARMS[name].model))
                except RequestFailed as e:
                    say(f"evaluation: surprise at neutral text is not measured for {name}: {e}")
                    nats = None
                if nats is None:
                    out[name] = {}  # not available from this server; values of only some texts are not comparable
                    break
                out[name][text] = nats
    return out


def neutral_texts() -> list[str]:
    """Return the texts at which the surprise is measured: plain ones, about nothing that recipes are about."""
    return [line for line in NEUTRAL.read_text(encoding="utf-8").splitlines() if line]


async def check_adapter_acts(generator: Any, texts: Sequence[str]) -> None:
    """Raise ServingError if the server gives the adapter's name the base's log-probabilities, on each of some texts.

    vLLM accepts adapters for some models without applying them. A server without log-probabilities is not checked.
    """
    for text in texts[:CHECKED_TEXTS]:
        try:
            base, adapted = await generator.surprise(text, None), await generator.surprise(text, ADAPTER)
        except RequestFailed as e:
            say(f"whether the server applies the adapter is not known: {e}")
            return
        if base is None or adapted is None or base != adapted:
            return
    raise ServingError(
        f"the server answers to the adapter's name as the base does: {CHECKED_TEXTS} texts have the same "
        "log-probabilities under both",
        "It does not apply the adapter to this model; merge the adapter into the base and serve that.",
    )


async def answer_prompts(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    complete: CompleteAs,
    score: ScoreText,
    veto: VetoText = no_veto,
    models: Sequence[str | None] | None = None,
    criticise: CompleteAs | None = None,
    level: Callable[[], int] | None = None,
) -> None:
    """Generate the turns of the arms of `models` (None: all) under evaluation/. Stored turns are not generated again.

    The arms run one after the other. On a CPU, vLLM's own operations let an adapter leak into requests to the base in
    the same batch (vllm-project/vllm#48421); ours do not (inference/vllm_lora.py), servers of others may.
    """
    run["evaluation"].mkdir(exist_ok=True)
    planned = [name for name in ARMS if name in recipe.evaluation.arms]
    for model in models_of(planned) if models is None else models:
        model_arms = [ARMS[name] for name in planned if ARMS[name].model == model]
        if model_arms:
            await _timed(run, model_arms[0], "answer", _answers(run, recipe, prompts, complete, model_arms[0], level))
        for arm in model_arms:
            if arm.way == "chain":
                # All arms draw with the recipe's seed, whatever seed the training chains had.
                update = {"chains_per_prompt": recipe.evaluation.samples, "seed": None}
                chains = recipe.model_copy(update={"chain": recipe.chain.model_copy(update=update)})
                work = run_with_line(
                    run,
                    chains,
                    prompts,
                    _as(complete, model),
                    score,
                    veto=veto,
                    criticise=_as(criticise or complete, model),
                    prefix=arm.prefix,
                    level=level,
                )
                await _timed(run, arm, arm.way, _whole(work))
            elif arm.way == "best":
                await _timed(run, arm, arm.way, _more_answers(run, recipe, prompts, complete, arm, level))


def _as(complete: CompleteAs, model: str | None) -> Complete:
    return lambda messages, seed, **tools: complete(messages, seed, name_at_server(model), **tools)


async def _whole(work: Awaitable[SamplingProgress]) -> None:
    """Raise KeyboardInterrupt if Ctrl-C interrupted the work: missing answers must not count as failed."""
    if (await work).interrupted:
        raise KeyboardInterrupt


async def _timed(run: Run, arm: Arm, what: str, work: Awaitable[Any]) -> None:
    """Run a part of the work and append its seconds; an interrupted session leaves only a row without seconds."""
    rows = run.rows(f"{arm.prefix}seconds.jsonl")
    rows.append({"what": what, "seconds": None})
    started = time.monotonic()
    await work
    rows.append({"what": what, "seconds": time.monotonic() - started})
    rows.close()


def seconds(run: Run, name: str) -> float | None:
    """Return the seconds that an arm took: the first answers of its model plus its own requests.

    None if a session of either part was interrupted.
    """
    arm, total = ARMS[name], 0.0
    for what in dict.fromkeys(("answer", arm.way)):
        recorded = [row["seconds"] for row in run.rows(f"{arm.prefix}seconds.jsonl") if row["what"] == what]
        if len(recorded) != 2 * sum(s is not None for s in recorded):
            return None
        total += sum(s for s in recorded if s is not None)
    return round(total, 2)


# -- generation


async def _answers(
    run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, arm: Arm, level: Callable[[], int] | None
) -> None:
    """Generate the first answer to every prompt and sample."""
    todo = [(p, k, 0) for p in prompts for k in range(recipe.evaluation.samples)]
    await _draw_answers(run, recipe, f"{arm.prefix}turns.jsonl", todo, complete, arm.model, level)


async def _more_answers(
    run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, arm: Arm, level: Callable[[], int] | None
) -> None:
    """Generate answers 1..n-1 of the arm's model; n answers cost as many tokens as the chain.

    `Turn.step` holds the answer's number.
    """
    n = answers_for_the_same_tokens(run, recipe)
    todo = [(p, k, j) for p in prompts for k in range(recipe.evaluation.samples) for j in range(1, n)]
    await _draw_answers(run, recipe, f"{arm.prefix}{MORE_ANSWERS}", todo, complete, arm.model, level)


def answers_for_the_same_tokens(run: Run, recipe: Recipe) -> int:
    """Return the number of base answers (at least 2) that cost as many new tokens as the chains of the base did.

    An arm of the adapter draws as many. Without the arm `self_critique`, return the number of turns of a chain.
    """
    if "self_critique" not in recipe.evaluation.arms:
        return 1 + 2 * recipe.chain.steps
    tokens = [(row["role"], row["new_tokens"]) for row in run.rows("evaluation/turns.jsonl")]
    answers = sum(n for role, n in tokens if role == "answer")
    return max(2, round(sum(n for _, n in tokens) / answers)) if answers else 1 + 2 * recipe.chain.steps


async def _draw_answers(
    run: Run,
    recipe: Recipe,
    file: str,
    todo: Iterable[tuple[Prompt, int, int]],
    complete: CompleteAs,
    model: str | None,
    level: Callable[[], int] | None,
) -> None:
    """Generate the plain answers of `todo`: (prompt, sample, number of the answer; 0 is the first)."""
    rows = run.rows(file)
    done = {(row["prompt_id"], row["chain"], row["step"]) for row in rows if row["role"] == "answer"}
    pending = [(p, k, j) for p, k, j in todo if (p.id, k, j) not in done]
    texts = texts_of(recipe.chain)
    unanswered = run.rows(file.replace("turns", "unanswered"))
    failures = CircuitBreaker({(row["prompt_id"], row["number"]) for row in unanswered}, works=bool(done))
    meter, failed, name = Meter(len(pending)), 0, model or "base"

    async def one(prompt: Prompt, sample: int, number: int) -> bool:
        seed = seed_of(recipe.seed, prompt.id, sample, number, "answer")
        try:
            c = await complete(texts.opening(prompt), seed, name_at_server(model), **tools_of(prompt))
        except RequestFailed as e:
            say(f"evaluation: {name} gave no answer to {prompt.id}: {e}")
            key = (prompt.id, sample << 16 | number)
            unanswered.append({"prompt_id": key[0], "number": key[1]})
            failures.failed(key, e)
            return False
        failures.answered()
        about = (c.text, c.finish_reason, c.prompt_tokens, c.new_tokens, seed)
        turn = Turn(prompt.id, sample, number, "answer", *about, thought=c.thought)
        rows.append(turn)
        return True

    try:
        with moving_line() as line:
            pool = TaskPool(level or (lambda: fixed_level(recipe)))
            async for ok in pool.over(partial(one, *x) for x in pending):
                meter.done += 1
                failed += not ok
                line.show(f"evaluation  {name}  answers {meter.done}/{meter.total}  failed {failed}{meter.left()}")
    finally:
        rows.close()
        unanswered.close()


# -- results


@dataclass(frozen=True)
class ArmAnswer:
    """Answer of one arm to one prompt and sample: text, finish reason, and the tokens of all turns that it took."""

    prompt_id: str
    sample: int
    text: str
    finish_reason: str
    new_tokens: int
    prompt_tokens: int
    raw: str = ""  # the whole text if an opening was stripped


def answers_of(
    run: Run,
    recipe: Recipe,
    name: str,
    prompts: Mapping[str, Prompt],
    score: Callable[[Sequence[str], Sequence[Prompt]], list[Any]],
) -> list[ArmAnswer]:
    """Return the answers of one arm, sorted by prompt id and sample; `score` is the reward that best-of-n maximises."""
    arm = ARMS[name]
    turns = [t for t in run.rows(f"{arm.prefix}turns.jsonl").as_type(Turn) if t.prompt_id in prompts]
    first = [t for t in turns if t.role == "answer"]
    if arm.way == "answer":
        answers = [_single(t) for t in first]
    elif arm.way == "chain":
        by_key = {t.key: t for t in turns}
        spent = _spent(turns)
        answers = []
        for c in read_chains(run, f"{arm.prefix}chains.jsonl"):
            if c.prompt_id in prompts:
                step = c.state_step
                state = by_key[c.prompt_id, c.number, step, "revision" if step else "answer"]
                raw = c.steps[step - 1].raw if step else c.answer_raw
                tokens = spent[c.prompt_id, c.number]
                answers.append(ArmAnswer(c.prompt_id, c.number, c.final, state.finish_reason, *tokens, raw))
    else:
        more = [t for t in run.rows(f"{arm.prefix}{MORE_ANSWERS}").as_type(Turn) if t.prompt_id in prompts]
        answers = _best(recipe, [*first, *more], prompts, score)
    return sorted(answers, key=lambda a: (a.prompt_id, a.sample))


def turns_of(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of all turns behind an arm's answers; the first answers of a model belong to all of its arms."""
    arm = ARMS[name]
    for row in run.rows(f"{arm.prefix}turns.jsonl"):
        if arm.way == "chain" or row["role"] == "answer":
            yield row
    if arm.way == "best":
        yield from run.rows(f"{arm.prefix}{MORE_ANSWERS}")


def all_turns(run: Run, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of all turns of some arms, each once."""
    for prefix in dict.fromkeys(ARMS[name].prefix for name in names):
        yield from run.rows(f"{prefix}turns.jsonl")
        if any(ARMS[name].way == "best" and ARMS[name].prefix == prefix for name in names):
            yield from run.rows(f"{prefix}{MORE_ANSWERS}")


def _single(t: Turn) -> ArmAnswer:
    return ArmAnswer(t.prompt_id, t.chain, t.text, t.finish_reason, t.new_tokens, t.prompt_tokens)


def _spent(turns: Iterable[Turn]) -> dict[tuple[str, int], tuple[int, int]]:
    """New and prompt tokens by prompt and sample."""
    out: dict[tuple[str, int], tuple[int, int]] = {}
    for t in turns:
        new_tokens, prompt_tokens = out.get((t.prompt_id, t.chain), (0, 0))
        out[t.prompt_id, t.chain] = (new_tokens + t.new_tokens, prompt_tokens + t.prompt_tokens)
    return out


def _best(
    recipe: Recipe,
    turns: Sequence[Turn],
    prompts: Mapping[str, Prompt],
    score: Callable[[Sequence[str], Sequence[Prompt]], list[Any]],
) -> list[ArmAnswer]:
    """Return the clean answer with the highest reward for each prompt and sample, as the chain would choose.

    If no answer is clean and scored, the first answer is returned.
    """
    inspections = [inspect(t.text, t.finish_reason, prompts[t.prompt_id], "", recipe.hygiene) for t in turns]
    scores = score([k.text for k in inspections], [prompts[t.prompt_id] for t in turns])
    # (prompt id, sample) -> (reward, minus the number, text, finish reason, raw)
    best: dict[tuple[str, int], tuple[float, int, str, str, str]] = {}
    for t, inspection, s in zip(turns, inspections, scores, strict=True):
        is_usable = not inspection.defect and s.value is not None
        if is_usable or t.step == 0:
            candidate = (
                s.value if is_usable else float("-inf"),
                -t.step,
                inspection.text,
                t.finish_reason,
                inspection.raw,
            )
            best[t.prompt_id, t.chain] = max(best.get((t.prompt_id, t.chain), candidate), candidate)
    spent = _spent(turns)
    return [ArmAnswer(*key, text, why, *spent[key], raw) for key, (_, _, text, why, raw) in best.items()]
