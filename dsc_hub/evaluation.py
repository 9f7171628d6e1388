"""Base, self-critique and distilled on the same held-out prompts with the same seeds: answers in, a table out.

The base's answers are the first answers of the self-critique chains (the very same requests), so they are asked for once.
Base and adapter are served by one process, the adapter unmerged, and asked one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub import claim, stats
from dsc_hub.chain import Message, Texts, seed_of
from dsc_hub.errors import ServingError
from dsc_hub.generation import Completion, RequestFailed
from dsc_hub.hygiene import REPEATED_3GRAMS, inspect
from dsc_hub.machine import file_hash
from dsc_hub.progress import Meter, moving_line, say
from dsc_hub.recipe import SCORERS, Recipe
from dsc_hub.records import Chain, Prompt, Score, Turn
from dsc_hub.runs import Run, read_json, write_json
from dsc_hub.sampling import MOST_FAILURES_IN_A_ROW, in_flight, read_chains, run_with_line

ADAPTER = "distilled"  # the name under which the adapter is served
CompleteAs = Callable[[list[Message], int, str | None], Awaitable[Completion]]  # messages, seed, model (None: the base)
Scorers = Mapping[str, Callable[[Sequence[str]], list[Score]]]
ANSWERS = pa.schema(
    [
        ("arm", pa.string()),
        ("prompt_id", pa.string()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("reward", pa.float64()),
        ("second", pa.float64()),
        ("third", pa.float64()),
        ("unscored_reason", pa.string()),
        ("finish_reason", pa.string()),
        ("new_tokens", pa.int64()),
        ("defect", pa.string()),
    ]
)


async def generate_arms(
    run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, score: Any
) -> dict[str, float | None]:
    """Write the turns of all arms under evaluation/; seconds spent on each (None where an earlier session did a part).

    What is there already is not asked for again. One arm after the other: on a CPU vLLM lets an adapter leak into requests
    to the base that share a batch with it (vllm-project/vllm#48421).
    """
    run["evaluation"].mkdir(exist_ok=True)
    seconds: dict[str, float | None] = {}
    mine: set[str] = set()  # files that this session began
    for arm in recipe.evaluation.arms:
        started = time.monotonic()
        whole = not run[_turns_file(arm)].is_file() or _turns_file(arm) in mine
        mine |= {_turns_file(arm)} if whole else set()
        if arm == "self_critique":
            one_chain = recipe.model_copy(update={"chain": recipe.chain.model_copy(update={"chains_per_prompt": 1})})
            await run_with_line(run, one_chain, prompts, lambda m, s: complete(m, s, None), score, prefix="evaluation/")
        else:
            await _answers(run, recipe, prompts, complete, arm)
        seconds[arm] = round(time.monotonic() - started, 2) if whole else None
    return seconds


def _turns_file(arm: str) -> str:
    return f"evaluation/{'distilled.' if arm == 'distilled' else ''}turns.jsonl"


async def _answers(run: Run, recipe: Recipe, prompts: Sequence[Prompt], complete: CompleteAs, arm: str) -> None:
    rows = run.rows(_turns_file(arm))
    done = {row["prompt_id"] for row in rows if row["role"] == "answer"}
    todo = [p for p in prompts if p.id not in done]
    texts = Texts(recipe.chain.critique, recipe.chain.revision, recipe.chain.system)
    meter, failed, in_a_row = Meter(len(todo)), 0, 0

    async def one(prompt: Prompt) -> bool:
        seed = seed_of(recipe.seed, prompt.id, 0, 0, "answer")
        try:
            c = await complete(texts.opening(prompt.text), seed, ADAPTER if arm == "distilled" else None)
        except RequestFailed as e:
            say(f"evaluation: {arm} gave no answer to {prompt.id}: {e}")
            return False
        rows.append(
            asdict(Turn(prompt.id, 0, 0, "answer", c.text, c.finish_reason, c.prompt_tokens, c.new_tokens, seed))
        )
        return True

    try:
        with moving_line() as line:
            async for ok in in_flight((lambda p=p: one(p) for p in todo), recipe.serving.concurrency):
                meter.done += 1
                failed += not ok
                in_a_row = 0 if ok else in_a_row + 1
                if in_a_row >= MOST_FAILURES_IN_A_ROW:
                    raise ServingError(f"{in_a_row} requests of the arm '{arm}' failed one after the other")
                line.show(f"evaluation  {arm}  answers {meter.done}/{meter.total}  failed {failed}{meter.left()}")
    finally:
        rows.close()


def collect(run: Run, recipe: Recipe, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """One row a prompt and arm, without scores: text, how it ended, and all new tokens it cost."""
    by_id = {p.id: p for p in prompts}
    # What the arms wrote is looked at as it is, and with the measure whose figures are known: being stricter in what is
    # learned from, and stripping, belong to the chain.
    rules = recipe.hygiene.model_copy(update={"meta_talk": "reject", "repeated": REPEATED_3GRAMS})

    out = []
    for arm in recipe.evaluation.arms:
        if arm == "self_critique":
            spent: dict[str, int] = {}
            finish: dict[tuple[str, int, str], str] = {}
            for row in run.rows("evaluation/turns.jsonl"):
                spent[row["prompt_id"]] = spent.get(row["prompt_id"], 0) + row["new_tokens"]
                finish[row["prompt_id"], row["step"], row["role"]] = row["finish_reason"]
            found = [
                (c.prompt_id, c.final, finish[_state_key(c)], spent[c.prompt_id])
                for c in read_chains(run, "evaluation/chains.jsonl")
            ]
        else:
            turns = (Turn(**row) for row in run.rows(_turns_file(arm)))
            found = [(t.prompt_id, t.text, t.finish_reason, t.new_tokens) for t in turns if t.role == "answer"]
        out += [
            {
                "arm": arm,
                "prompt_id": i,
                "group": by_id[i].group,
                "prompt": by_id[i].text,
                "text": text,
                "finish_reason": why,
                "new_tokens": tokens,
                "defect": inspect(text, why, by_id[i], "", rules).defect,
            }
            for i, text, why, tokens in sorted(found)
            if i in by_id
        ]
    return out


def _state_key(chain: Chain) -> tuple[str, int, str]:
    return (chain.prompt_id, chain.state_step, "revision" if chain.state_step else "answer")


def score_answers(answers: list[dict[str, Any]], scorers: Scorers) -> None:
    """Add `reward`, `second` and `third` (None if unscored or without such a scorer) and `unscored_reason` to the rows."""
    for name in SCORERS:
        scores = (
            scorers[name]([a["text"] for a in answers])
            if name in scorers
            else [Score(None, "no scorer")] * len(answers)
        )
        for answer, score in zip(answers, scores, strict=True):
            answer[name] = score.value
            if name == "reward":
                answer["unscored_reason"] = score.reason


def summarise(
    recipe: Recipe, prompts: Sequence[Prompt], answers: list[dict[str, Any]], higher_is_better: Mapping[str, bool]
) -> dict[str, Any]:
    """Arms with interval, n, unscored, failed for each score; paired differences to the first arm; the claim.

    `higher_is_better` names the scores of the rows and says which way is good.
    """
    names = list(higher_is_better)
    confidence = recipe.evaluation.confidence
    arms: dict[str, Any] = {}
    by_arm = {arm: {a["prompt_id"]: a for a in answers if a["arm"] == arm} for arm in recipe.evaluation.arms}
    for arm, rows in by_arm.items():
        arms[arm] = {
            "new_tokens": sum(a["new_tokens"] for a in rows.values()),
            "new_tokens_mean": _mean([a["new_tokens"] for a in rows.values()]),
            "stops_by_itself": _mean([a["finish_reason"] == "stop" for a in rows.values()]),
            "defects": _mean([bool(a["defect"]) for a in rows.values()]),
        }
        for name in names:
            scored = [a for a in rows.values() if a[name] is not None]
            arms[arm][name] = stats.estimate([a[name] for a in scored], [a["group"] for a in scored], confidence) | {
                "unscored": len(rows) - len(scored),
                "failed": len(prompts) - len(rows),
            }
    first, *others = recipe.evaluation.arms
    differences = {
        f"{arm} - {first}": {name: _paired(by_arm[arm], by_arm[first], name, confidence) for name in names}
        for arm in others
    }
    compared = {"base", "distilled"} <= set(by_arm) and first == "base"
    return {
        "split": recipe.evaluation.split,
        "confidence": confidence,
        "prompts": len(prompts),
        "groups": len({p.group for p in prompts}),
        "arms": arms,
        "differences": differences,
        "claim": claim.judge(
            answers, prompts, recipe.evaluation.split, confidence, differences["distilled - base"], higher_is_better
        )
        if compared
        else None,
    }


def _paired(a: Mapping[str, Any], b: Mapping[str, Any], name: str, confidence: float) -> dict[str, Any]:
    both = [i for i in sorted(a) if i in b and a[i][name] is not None and b[i][name] is not None]
    return stats.paired_difference(
        [a[i][name] for i in both], [b[i][name] for i in both], [a[i]["group"] for i in both], confidence
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_answers(run: Run, answers: list[dict[str, Any]], split: str) -> Path:
    """The answers as rows for the report and as Parquet for the dataset repo."""
    rows = run.rows("evaluation/answers.jsonl")
    rows.path.unlink(missing_ok=True)
    for answer in answers:
        rows.append(answer)
    rows.close()
    path = run["dataset"] / "evaluation" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(answers, schema=ANSWERS), path)
    return path


def count_adapters(runs: Path, prompts: Sequence[Prompt], adapter: Path | None) -> dict[str, Any]:
    """Enter this adapter in the ledger of the test set and say how many different adapters it has ever scored.

    The more adapters one tries on a test set, the less its best number means; the ledger lies beside the runs.
    """
    import fcntl
    import hashlib

    test_set = hashlib.sha256("\n".join(sorted(p.id for p in prompts)).encode()).hexdigest()[:12]
    ledger = runs / "test_sets.json"
    with (runs / "test_sets.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known: dict[str, list[str]] = read_json(ledger) if ledger.is_file() else {}
        scored = set(known.get(test_set, ()))
        if adapter is not None:
            scored.add(file_hash(adapter))
        known[test_set] = sorted(scored)
        write_json(ledger, known)
    return {"id": test_set, "adapters_scored": len(scored)}
