"""The arms of an evaluation: the same prompts with the same seeds, answered in every way that is compared.

    base            one plain answer of the base model
    self_critique   the chain at test time: its final state
    best_of_n       the best by reward of n answers of the base, n such that they cost as many tokens as the chain
    distilled       one plain answer of the base with the adapter
    distilled_self_critique   the chain with the adapter

The adapter is served unmerged beside its base, and the arms of one model are asked before those of the other. An arm's first
answer is the very request that the plain arm of its model made, so it is asked for once. Scores and numbers are made in evaluation.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_hub.chain.chain import Message, ScoreText, Texts, VetoText, no_veto, seed_of
from dsc_hub.chain.hygiene import inspect
from dsc_hub.config.arms import ADAPTER, ARMS, Arm, models_of
from dsc_hub.config.recipe import Recipe, quantization
from dsc_hub.inference.client import Completion, RequestFailed
from dsc_hub.inference.task_pool import TaskPool
from dsc_hub.records import Prompt, Turn
from dsc_hub.runs.reuse import copy_files
from dsc_hub.runs.run import Run
from dsc_hub.sampling.sample import CircuitBreaker, SamplingProgress, fixed_level, read_chains, run_with_line
from dsc_hub.system.files import read_object, write_json
from dsc_hub.system.hashing import digest
from dsc_hub.system.progress import Meter, moving_line, say

CompleteAs = Callable[[list[Message], int, str | None], Awaitable[Completion]]  # messages, seed, model (None: the base)
BEST_OF_N = "evaluation/best_of_n.turns.jsonl"
NEUTRAL = (
    Path(__file__).parent.parent / "metrics" / "neutral.txt"
)  # a text a line, about nothing that a recipe is about


async def ask_all(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    generator: Any,
    score: ScoreText,
    veto: VetoText,
    models: Sequence[str | None],
) -> dict[str, dict[str, float]]:
    """`ask` with a `Generator`; gives the nats a token of the neutral texts, by arm and text, where the server tells them."""
    await ask(run, recipe, prompts, generator.complete, score, veto, models, generator.criticise, generator.level)
    texts = [line for line in NEUTRAL.read_text(encoding="utf-8").splitlines() if line]
    out: dict[str, dict[str, float]] = {}
    for name in recipe.evaluation.arms:
        if ARMS[name].way == "answer" and ARMS[name].model in models:
            out[name] = {}
            for text in texts:
                try:
                    nats = await generator.surprise(text, ARMS[name].model)
                except RequestFailed as e:
                    say(f"evaluation: surprise at neutral text is not measured for {name}: {e}")
                    nats = None
                if nats is None:
                    out[name] = {}  # this server doesn't tell; what some texts gave would not be comparable
                    break
                out[name][text] = nats
    return out


async def ask(
    run: Run,
    recipe: Recipe,
    prompts: Sequence[Prompt],
    complete: CompleteAs,
    score: ScoreText,
    veto: VetoText = no_veto,
    models: Sequence[str | None] = (None, ADAPTER),
    criticise: CompleteAs | None = None,
    level: Callable[[], int] | None = None,
) -> None:
    """Write the turns of the arms of `models` under evaluation/. What is there already is not asked for again.

    One arm after the other: on a CPU vLLM lets an adapter leak into requests to the base that share a batch with it
    (vllm-project/vllm#48421).
    """
    run["evaluation"].mkdir(exist_ok=True)
    wanted = [name for name in ARMS if name in recipe.evaluation.arms]
    for model in models:
        mine = [ARMS[name] for name in wanted if ARMS[name].model == model]
        if mine:
            await _timed(run, mine[0], "answer", _answers(run, recipe, prompts, complete, mine[0], level))
        for arm in mine:
            if arm.way == "chain":
                few = {"chains_per_prompt": recipe.evaluation.samples}
                chains = recipe.model_copy(update={"chain": recipe.chain.model_copy(update=few)})
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
                await _timed(run, arm, arm.way, _more_answers(run, recipe, prompts, complete, level))


def _as(complete: CompleteAs, model: str | None) -> Callable[[list[Message], int], Awaitable[Completion]]:
    return lambda messages, seed: complete(messages, seed, model)


async def _whole(work: Awaitable[SamplingProgress]) -> None:
    """KeyboardInterrupt if Ctrl-C broke it off: what is missing must not pass for failed."""
    if (await work).interrupted:
        raise KeyboardInterrupt


async def _timed(run: Run, arm: Arm, what: str, work: Awaitable[Any]) -> None:
    """Do a part of the work and note its seconds, over all sessions that did some of it; a broken-off one notes its start."""
    rows = run.rows(f"{arm.prefix}seconds.jsonl")
    rows.append({"what": what, "seconds": None})
    started = time.monotonic()
    await work
    rows.append({"what": what, "seconds": time.monotonic() - started})
    rows.close()


def seconds(run: Run, name: str) -> float | None:
    """Seconds that an arm took: its model's first answers and what it asked for itself. None if a session on either was
    broken off."""
    arm, total = ARMS[name], 0.0
    for what in dict.fromkeys(("answer", arm.way)):
        noted = [row["seconds"] for row in run.rows(f"{arm.prefix}seconds.jsonl") if row["what"] == what]
        if len(noted) != 2 * sum(s is not None for s in noted):
            return None
        total += sum(s for s in noted if s is not None)
    return round(total, 2)


# -- the base's arms, which don't depend on the adapter: another run's are taken where all they depend on is the same

BASE = "evaluation/base_arms.json"  # written when they are whole: their digest, and the nats of neutral texts
# The first one is the last to be there (`Run.copy_files`): without it nothing was taken.
BASE_FILES = (
    "evaluation/turns.jsonl",
    "evaluation/chains.jsonl",
    "evaluation/unanswered.jsonl",
    "evaluation/failed.jsonl",
    "evaluation/seconds.jsonl",
    BEST_OF_N,
    BEST_OF_N.replace("turns", "unanswered"),
    BASE,
)


def base_digest(recipe: Recipe, sampling: str) -> str:
    """Of all that the base's answers depend on: model, prompts, chain, generation and reward (`sampling`, that stage's
    fingerprint), what the evaluation asks of the base, and on which weights it is served, which is how training
    quantises it."""
    e, arms = recipe.evaluation, recipe.evaluation.arms
    names = [name for name in ARMS if name in arms and ARMS[name].model is None]
    weights = quantization(recipe.distill.model_dump()) if ADAPTER in models_of(arms) else None
    return digest(sampling, e.samples, e.split, e.temperature, names, weights)


def adopt_base(run: Run, base: str, siblings: Iterable[Run]) -> str:
    """Copy the base's arms from a sibling that has them whole, if there are none here; its name, "" without one."""
    if run[BASE_FILES[0]].exists():
        return ""
    for donor in siblings:
        if donor.folder != run.folder and finished_base(donor, base) is not None:
            run["evaluation"].mkdir(exist_ok=True)
            copy_files(run, donor, BASE_FILES)
            return donor.folder.name
    return ""


def finished_base(run: Run, base: str) -> dict[str, dict[str, float]] | None:
    """Nats of neutral texts by arm, if the base's arms are whole here and of this digest; None if not."""
    if not (run[BASE].is_file() and run[BASE_FILES[0]].is_file()):
        return None
    recorded = read_object(run[BASE])
    return recorded["neutral"] if recorded.get("digest") == base else None


def finish_base(
    run: Run, base: str, answers: Iterable[Mapping[str, Any]], each: int, neutral: Mapping[str, Mapping[str, float]]
) -> None:
    """Record that the base's arms are whole, if they are: every one of them has `each` answers."""
    names = [name for name in run.facts["recipe"]["evaluation"]["arms"] if ARMS[name].model is None]
    counts = Counter(a["arm"] for a in answers)
    if names and all(counts[name] == each for name in names):
        measured = {name: dict(neutral[name]) for name in names if name in neutral}
        write_json(run[BASE], {"digest": base, "neutral": measured})


# -- asking


async def _answers(
    run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, arm: Arm, level: Callable[[], int] | None
) -> None:
    """The first answer to every prompt and sample."""
    todo = [(p, k, 0) for p in prompts for k in range(recipe.evaluation.samples)]
    await _draw(run, recipe, f"{arm.prefix}turns.jsonl", todo, complete, arm.model, level)


async def _more_answers(
    run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, level: Callable[[], int] | None
) -> None:
    """Answers 1..n-1 beside the first, as many as make the chain's tokens. In their turns `step` numbers them."""
    n = answers_for_the_same_tokens(run, recipe)
    todo = [(p, k, j) for p in prompts for k in range(recipe.evaluation.samples) for j in range(1, n)]
    await _draw(run, recipe, BEST_OF_N, todo, complete, None, level)


def answers_for_the_same_tokens(run: Run, recipe: Recipe) -> int:
    """How many answers of the base cost as many new tokens as the chains did (at least 2); without the arm
    `self_critique`, as many as the chain has turns."""
    if "self_critique" not in recipe.evaluation.arms:
        return 1 + 2 * recipe.chain.steps
    tokens = [(row["role"], row["new_tokens"]) for row in run.rows("evaluation/turns.jsonl")]
    answers = sum(n for role, n in tokens if role == "answer")
    return max(2, round(sum(n for _, n in tokens) / answers)) if answers else 1 + 2 * recipe.chain.steps


async def _draw(
    run: Run,
    recipe: Recipe,
    file: str,
    todo: Iterable[tuple[Prompt, int, int]],
    complete: CompleteAs,
    model: str | None,
    level: Callable[[], int] | None,
) -> None:
    """Ask for plain answers: prompt, sample, number of the answer (0: the first)."""
    rows = run.rows(file)
    done = {(row["prompt_id"], row["chain"], row["step"]) for row in rows if row["role"] == "answer"}
    left = [(p, k, j) for p, k, j in todo if (p.id, k, j) not in done]
    texts = Texts(recipe.chain.critique, recipe.chain.revision, recipe.chain.system)
    unanswered = run.rows(file.replace("turns", "unanswered"))
    failures = CircuitBreaker({(row["prompt_id"], row["number"]) for row in unanswered}, works=bool(done))
    meter, failed, name = Meter(len(left)), 0, model or "base"

    async def one(prompt: Prompt, sample: int, number: int) -> bool:
        seed = seed_of(recipe.seed, prompt.id, sample, number, "answer")
        try:
            c = await complete(texts.opening(prompt.text), seed, model)
        except RequestFailed as e:
            say(f"evaluation: {name} gave no answer to {prompt.id}: {e}")
            key = (prompt.id, sample << 16 | number)
            unanswered.append({"prompt_id": key[0], "number": key[1]})
            failures.failed(key, e)
            return False
        failures.answered()
        turn = Turn(prompt.id, sample, number, "answer", c.text, c.finish_reason, c.prompt_tokens, c.new_tokens, seed)
        rows.append(turn)
        return True

    try:
        with moving_line() as line:
            flow = TaskPool(level or (lambda: fixed_level(recipe)))
            async for ok in flow.over((lambda x=x: one(*x)) for x in left):
                meter.done += 1
                failed += not ok
                line.show(f"evaluation  {name}  answers {meter.done}/{meter.total}  failed {failed}{meter.left()}")
    finally:
        rows.close()
        unanswered.close()


# -- what came of it


@dataclass(frozen=True)
class Answer:
    """What one arm gave to one prompt and sample: text, how it ended, and all new tokens that it took."""

    prompt_id: str
    sample: int
    text: str
    finish_reason: str
    new_tokens: int
    prompt_tokens: int
    raw: str = ""  # the whole text where an opening was stripped off it


def answers_of(
    run: Run,
    recipe: Recipe,
    name: str,
    prompts: Mapping[str, Prompt],
    score: Callable[[Sequence[str], Sequence[Prompt]], list[Any]],
) -> list[Answer]:
    """The answers of one arm, in the order of prompt ids and samples; `score` is the reward, by which best-of-n chooses."""
    arm = ARMS[name]
    turns = [t for t in run.rows(f"{arm.prefix}turns.jsonl").as_type(Turn) if t.prompt_id in prompts]
    first = [t for t in turns if t.role == "answer"]
    if arm.way == "answer":
        found = [_single(t) for t in first]
    elif arm.way == "chain":
        by_key = {t.key: t for t in turns}
        spent = _spent(turns)
        found = []
        for c in read_chains(run, f"{arm.prefix}chains.jsonl"):
            if c.prompt_id in prompts:
                at = c.state_step
                state = by_key[c.prompt_id, c.number, at, "revision" if at else "answer"]
                raw = c.steps[at - 1].raw if at else c.answer_raw
                tokens = spent[c.prompt_id, c.number]
                found.append(Answer(c.prompt_id, c.number, c.final, state.finish_reason, *tokens, raw))
    else:
        more = [t for t in run.rows(BEST_OF_N).as_type(Turn) if t.prompt_id in prompts]
        found = _best(recipe, [*first, *more], prompts, score)
    return sorted(found, key=lambda a: (a.prompt_id, a.sample))


def _single(t: Turn) -> Answer:
    return Answer(t.prompt_id, t.chain, t.text, t.finish_reason, t.new_tokens, t.prompt_tokens)


def _spent(turns: Iterable[Turn]) -> dict[tuple[str, int], tuple[int, int]]:
    """New and prompt tokens by prompt and sample."""
    out: dict[tuple[str, int], tuple[int, int]] = {}
    for t in turns:
        new, asked = out.get((t.prompt_id, t.chain), (0, 0))
        out[t.prompt_id, t.chain] = (new + t.new_tokens, asked + t.prompt_tokens)
    return out


def _best(
    recipe: Recipe,
    turns: Sequence[Turn],
    prompts: Mapping[str, Prompt],
    score: Callable[[Sequence[str], Sequence[Prompt]], list[Any]],
) -> list[Answer]:
    """Of each prompt and sample the answer of highest reward among the clean and scored ones, as the chain would choose;
    the first answer where none is."""
    kept = [inspect(t.text, t.finish_reason, prompts[t.prompt_id], "", recipe.hygiene) for t in turns]
    scores = score([k.text for k in kept], [prompts[t.prompt_id] for t in turns])
    # prompt and sample -> reward, minus the number, text, how it ended, raw
    best: dict[tuple[str, int], tuple[float, int, str, str, str]] = {}
    for t, found, s in zip(turns, kept, scores, strict=True):
        fit = not found.defect and s.value is not None
        if fit or t.step == 0:
            candidate = (s.value if fit else float("-inf"), -t.step, found.text, t.finish_reason, found.raw)
            best[t.prompt_id, t.chain] = max(best.get((t.prompt_id, t.chain), candidate), candidate)
    spent = _spent(turns)
    return [Answer(*key, text, why, *spent[key], raw) for key, (_, _, text, why, raw) in best.items()]
