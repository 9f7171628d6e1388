"""Import result rows of the reference implementation as chains of a run; the later stages continue from them.

The rows are a JSON list of {prompt, summary_pre, summary_after, scores_pre, scores_after}: a first answer, its single
revision and the rewards of both. Critiques and token counts are not included and stay unknown. The rewards come from
the rows; hygiene and the acceptance rule come from the recipe.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsc_hub.acceptance import make_rule
from dsc_hub.chain.chain import Texts, dice_of, run_chain
from dsc_hub.chain.hygiene import inspect
from dsc_hub.config.recipe import Recipe, chain_seed
from dsc_hub.errors import ConfigError, DataError
from dsc_hub.pipeline import resolve, run
from dsc_hub.pipeline.context import RunContext, record, set_owner
from dsc_hub.records import SPLITS, Chain, Message, Prompt, Role, Score, Turn
from dsc_hub.runs.metrics_schema import Sampling
from dsc_hub.sampling import summary
from dsc_hub.system import event_loop
from dsc_hub.system.files import parse_json, write_whole
from dsc_hub.system.hashing import file_hash
from dsc_hub.system.progress import say

KEYS = ("prompt", "summary_pre", "summary_after", "scores_pre", "scores_after")
SHOWN = 20  # maximum number of problems reported
UNKNOWN = "not scored in the imported rows"


@dataclass(frozen=True)
class ResultRow:
    """One result row; a reward is None if the row has none."""

    prompt: str
    texts: tuple[str, str]  # before, after
    rewards: tuple[float | None, float | None]

    @property
    def is_better(self) -> bool:
        before, after = self.rewards
        return before is not None and after is not None and after > before


def read_result_rows(file: Path) -> list[ResultRow]:
    """Read the rows of a file. DataError if it is no JSON list of rows; ConfigError with the first SHOWN bad rows."""
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file} not found", "Name the file of result rows, a JSON list.") from None
    except ValueError as e:
        raise DataError(f"{file} is not JSON: {e}", "Expected a JSON list of result rows.") from None
    if not isinstance(data, list) or not data:
        raise DataError(
            f"{file}: expected a list of result rows, got {_kind(data)}", f"Each row has {', '.join(KEYS)}."
        )
    rows, problems = [], []
    for number, value in enumerate(data, 1):
        result = _row(value)
        if isinstance(result, str):
            problems.append(f"row {number}: {result}")
        else:
            rows.append(result)
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ConfigError(
            f"{file}: {len(problems)} of {len(data)} rows can't be read", problems=[*problems[:SHOWN], *more]
        )
    return rows


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", str: "a text"}
    return "an empty list" if value == [] else names.get(type(value), type(value).__name__)


def _row(value: Any) -> ResultRow | str:
    """Return the parsed row, or a message that describes its problem."""
    if not isinstance(value, dict):
        return f"expected an object, got {_kind(value)}"
    if missing := [key for key in KEYS if key not in value]:
        return f"no {', '.join(missing)}"
    for key in KEYS[:3]:
        if not isinstance(value[key], str):
            return f"{key} should be text, got {_kind(value[key])}"
    if not value["prompt"].strip():
        return "prompt is empty"
    rewards = []
    for key in KEYS[3:]:
        reward = value[key][0] if isinstance(value[key], list) and len(value[key]) == 1 else value[key]
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, (int, float))):
            return f"{key} should be a number or null, got {value[key]!r:.40}"
        if reward is not None and not math.isfinite(reward):
            return f"{key} is {reward}, which is no reward"
        rewards.append(None if reward is None else float(reward))
    return ResultRow(value["prompt"].strip(), (value["summary_pre"], value["summary_after"]), (rewards[0], rewards[1]))


def chains_from_rows(made: Recipe, prompts: Sequence[Prompt], rows: Sequence[ResultRow]) -> list[Chain]:
    """Build a one-step chain for each row whose prompt is not held out, with the recipe's acceptance and hygiene."""
    by_text = {p.text: p for p in prompts if p.split != "test" and not p.messages}
    seen: Counter[str] = Counter()
    out = []
    for row in rows:
        if (prompt := by_text.get(row.prompt)) is not None:
            out.append(event_loop.run_coroutine(_chain(made, prompt, seen[prompt.id], row)))
            seen[prompt.id] += 1
    return sorted(out, key=lambda c: c.key)


async def _chain(made: Recipe, prompt: Prompt, number: int, row: ResultRow) -> Chain:
    texts = {"answer": row.texts[0], "critique": "", "revision": row.texts[1]}
    rewards = iter(row.rewards)

    async def generate(messages: list[Message], about: Prompt, chain: int, step: int, role: Role) -> Turn:
        return Turn(about.id, chain, step, role, texts[role], "stop", 0, 0, 0)

    def score(text: str, about: Prompt) -> Awaitable[Score]:
        reward = next(rewards)  # at the call: the answer is scored first, whichever is awaited first

        async def result() -> Score:
            return Score(reward, "" if reward is not None else UNKNOWN)

        return result()

    return await run_chain(
        prompt,
        number,
        texts=Texts("", "", made.chain.system),
        steps=1,
        generate=generate,
        score=score,
        rule=make_rule(made.chain.acceptance, made.chain.temperature),
        dice=dice_of(chain_seed(made)),
        inspect=lambda turn, about, critique: inspect(turn.text, turn.finish_reason, about, critique, made.hygiene),
    )


def import_rows(
    file: Path, reference: str, overrides: Sequence[str], folder: Path, runs: Path
) -> tuple[RunContext, dict[str, int]]:
    """Write a recipe with the rows' prompts to `folder`, and a run folder with the rows' chains.

    Return the run context and the counts {rows, better, chains, held_out}. The recipe is `reference` with one step; its
    other sections configure the stages after sampling. ConfigError if the folder exists.
    """
    rows = read_result_rows(file)
    if folder.exists():
        raise ConfigError(f"{folder} exists", "Name another folder with --to: nothing is overwritten.")
    path, base = resolve.load_recipe(reference, overrides)
    data = base.model_dump(mode="json", exclude_defaults=True)
    for kind in resolve.named_by_others(reference, path, base, overrides):
        data.get("publish", {}).pop(kind, None)  # the copy is the user's: its folder names its repos
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in folder.resolve().name.lower()).strip("-")[:64]
    split = data["prompts"].get("split")
    data |= {"name": name or "imported", "prompts": {"path": "prompts.jsonl"} | ({"split": split} if split else {})}
    data["chain"] |= {"steps": 1, "chains_per_prompt": max(Counter(r.prompt for r in rows).values())}
    for section, key in (("chain", "good_enough"), ("dataset", "rows"), ("", "budget")):  # of sampling
        (data.get(section, {}) if section else data).pop(key, None)
    data.get("hygiene", {}).pop("subject", None)  # prompts of the rows have no group
    for key in ("critique", "revision"):
        texts = data["chain"][key]
        replaced = [t.replace("{group}", "{prompt}") for t in ([texts] if isinstance(texts, str) else texts)]
        data["chain"][key] = replaced[0] if isinstance(texts, str) else replaced
    prompts = dict.fromkeys(row.prompt for row in rows)
    write_whole(
        folder / "prompts.jsonl", "".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts)
    )
    write_whole(folder / "recipe.yaml", yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))
    context = resolve.resolve_recipe(str(folder / "recipe.yaml"), [], runs)
    return context, _write_chains(context, rows, {"rows": len(rows), "sha256": file_hash(file), "file": file.name})


def _write_chains(context: RunContext, rows: Sequence[ResultRow], imported: Mapping[str, Any]) -> dict[str, int]:
    """Write prompts and chains into the run folder, as the stages `prompts` and `sampling` do."""
    with context.run.lock():
        record(context)
        context.run.add_facts(imported=dict(imported))
        set_owner(context, None)
        run.run_stage(context, "prompts")
        prompts = context.prompts(*SPLITS)
        chains = chains_from_rows(context.recipe, prompts, rows)
        if not chains:
            raise DataError("no row's prompt is left to train on", "Give more prompts, or another prompts.split.")
        file = context.run.rows("chains.jsonl")
        for chain in chains:
            file.append(chain.as_row())
        file.close()
        group_of = {p.id: p.group for p in prompts}.__getitem__
        numbers = summary.chain_numbers(chains, group_of, len(chains), context.recipe.chain)
        unknown = dict.fromkeys(("prompt_tokens", "new_tokens", "seconds", "tokens_per_s"))
        numbers |= unknown | {"reused_turns": 0}
        context.run.add_metrics("sampling", numbers)
        context.run.finish("sampling", context.fingerprints["sampling"], 0.0, {"result": numbers})
    counts = {"rows": len(rows), "better": sum(r.is_better for r in rows), "chains": len(chains)}
    counts["held_out"] = len(rows) - len(chains)
    say(
        f"imported  {counts['rows']} rows, {counts['better']} strictly better after the revision; {counts['chains']} "
        f"chains, {counts['held_out']} rows of held-out or left-out prompts -> {context.run.folder}"
    )
    for line in summary.waterfall_lines(Sampling.model_validate(numbers)):
        say(line)
    return counts
