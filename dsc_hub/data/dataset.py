"""Build the training data from chains: Parquet files in the layout of the dataset repo.

    dataset/sft/{train,validation}-00000-of-00001.parquet          prompt -> completion, kept answers only
    dataset/preference/...                                         final answer over first answer, with the margin > 0
    dataset/repairs/...                                            final answer over a first answer with a defect
    dataset/chains/...                                             every turn, score and decision

Test prompts have no chains here, and a chain of a test prompt is refused, so training never sees one.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsc_hub.acceptance import RULES
from dsc_hub.chain.chain import NOT_BETTER, texts_of
from dsc_hub.chain.subject import subject_of, without
from dsc_hub.chain.text import phrases
from dsc_hub.config.recipe import Recipe, least_gain
from dsc_hub.errors import DataError
from dsc_hub.records import SPLITS, Chain, Prompt, Split, from_row
from dsc_hub.runs.run import Run
from dsc_hub.system.hashing import digest

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_STEP = pa.struct(
    [
        ("number", pa.int32()),
        ("critique", pa.string()),
        ("revision", pa.string()),
        ("raw", pa.string()),
        ("reward", pa.float64()),
        ("unscored_reason", pa.string()),
        ("defect", pa.string()),
        ("rejected", pa.string()),
    ]
)
_COMMON = [("prompt_id", pa.string()), ("group", pa.string()), ("chain", pa.int32())]
SCHEMAS = {
    "sft": pa.schema(
        [
            ("prompt", _MESSAGES),
            ("completion", _MESSAGES),
            *_COMMON,
            ("reward", pa.float64()),
            ("first_reward", pa.float64()),
        ]
    ),
    "preference": pa.schema(
        [("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES), *_COMMON, ("margin", pa.float64())]
    ),
    "repairs": pa.schema(
        [("prompt", _MESSAGES), ("chosen", _MESSAGES), ("rejected", _MESSAGES), *_COMMON, ("defect", pa.string())]
    ),
    "chains": pa.schema(
        [
            ("prompt", pa.string()),
            *_COMMON,
            ("answer", pa.string()),
            ("answer_raw", pa.string()),
            ("answer_reward", pa.float64()),
            ("answer_unscored_reason", pa.string()),
            ("answer_defect", pa.string()),
            ("steps", pa.list_(_STEP)),
            ("final", pa.string()),
            ("final_reward", pa.float64()),
            ("final_step", pa.int32()),
            ("final_defect", pa.string()),
        ]
    ),
}
_TOOLS = ("tools", pa.string())  # JSON text, as trl reads it: as a struct each schema would get the keys of all
CHUNK_ROWS = 2000
PHRASE_WORDS = 4
# Rules by which rows and pairs are selected; recorded, so that datasets of older rules can still be verified.
# 1: of alike rows the first by prompt id is kept; pairs of any margin, beside first answers with a defect, too.
SELECTION = 2

NOT_COMPARED = "nothing to compare with: the first answer is unscored"


def gain(chain: Chain) -> float | None:
    """Return the final reward minus the first answer's reward.

    If the first answer was dirty (reward -inf): +inf with an accepted revision, else 0. None if one of the two texts is
    unscored: a missing score is not -inf.
    """
    if chain.answer_defect:
        return math.inf if chain.state_step else 0.0
    if chain.final_score.value is None or chain.answer_score.value is None:
        return None
    return chain.final_score.value - chain.answer_score.value


def is_compared(chain: Chain) -> bool:
    """Return whether the final state's reward was compared with that of another clean text of the chain.

    The first clean revision after a dirty first answer is accepted without a comparison, and stays uncompared if no
    later revision is clean.
    """
    has_first = not chain.answer_defect and chain.answer_score.value is not None
    return has_first + sum(s.accepted or s.rejected == NOT_BETTER for s in chain.steps) > 1


def why_dropped(chain: Chain, min_reward: float | None, min_gain: float | None) -> str:
    """Return why a chain yields no training row; "" if it yields one."""
    if chain.answer_defect and not chain.state_step:
        return "no clean final state"
    value = chain.final_score.value
    if value is None:
        return "unscored"
    if min_gain is not None:
        gained = gain(chain)
        if gained is None:
            return NOT_COMPARED
        if not gained > min_gain:
            return "no gain over the first answer" if min_gain == 0 else f"gain not above {min_gain:g}"
    if min_reward is not None and value < min_reward:
        return f"reward below {min_reward:g}"
    return ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What decides whether a chain with a good enough answer becomes a row. Texts are kept as hashes."""

    reward: float
    prompt_id: str
    number: int
    split: Split
    text: int
    phrases: array[int]

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.number


def candidate_of(chain: Chain, prompt: Prompt, recipe: Recipe) -> Candidate | str:
    """Return the candidate that a chain is for a row, or why it is none (`why_dropped`)."""
    if reason := why_dropped(chain, recipe.dataset.min_reward, least_gain(recipe)):
        return reason
    # The subject's name counts as one word, so that "X is a masterpiece of" is the same phrase for every X.
    words = without(chain.final, subject_of(prompt)) if recipe.dataset.phrase_limit else []
    return Candidate(
        reward=chain.final_score.value or 0.0,
        prompt_id=chain.prompt_id,
        number=chain.number,
        split=prompt.split,
        text=hash(chain.final),
        phrases=array("q", {hash(phrase) for phrase in phrases(words, PHRASE_WORDS)}),
    )


def select_rows(
    candidates: Iterable[Candidate], recipe: Recipe, selection: int = SELECTION, limited: bool = True
) -> tuple[set[tuple[str, int]], Counter[str]]:
    """Return the keys of the candidates that become rows, and the number of others by reason.

    Of rows that are alike, or too many of one prompt, those with the highest reward win (`selection` 1: the first
    ones). More training rows than `dataset.rows` are left out by chance, not by reward; not `limited`: they are not.
    """
    section = recipe.dataset
    if selection > 1:
        candidates = sorted(candidates, key=lambda c: (-c.reward, c.key))
    # Draws from a target distribution repeat themselves where it is high: without repetition they are none.
    keep_duplicates = RULES[recipe.chain.acceptance].can_descend or selection == 1
    chosen, of_train, dropped = set[tuple[str, int]](), list[tuple[str, int]](), Counter[str]()
    texts, rows = set[tuple[str, int]](), Counter[str]()  # (prompt id, text); rows by prompt id
    seen = {split: Counter[int]() for split in SPLITS}  # rows that contain a phrase
    for c in candidates:
        if not keep_duplicates and (c.prompt_id, c.text) in texts:
            dropped["the same answer as another row of its prompt"] += 1
        elif section.rows_per_prompt and rows[c.prompt_id] >= section.rows_per_prompt:
            dropped[f"{section.rows_per_prompt} better rows of its prompt"] += 1
        elif section.phrase_limit and any(seen[c.split][phrase] >= section.phrase_limit for phrase in c.phrases):
            dropped[f"a phrase that {section.phrase_limit} rows have already"] += 1
        else:
            texts.add((c.prompt_id, c.text))
            rows[c.prompt_id] += 1
            seen[c.split].update(c.phrases)
            chosen.add(c.key)
            of_train += [c.key] * (c.split == "train")
    if limited and section.rows is not None and len(of_train) > section.rows:
        by_chance = sorted(of_train, key=lambda key: digest("row", *key))
        chosen -= set(by_chance[section.rows :])
        dropped[f"more than {section.rows} rows"] += len(of_train) - section.rows
    return chosen, dropped


def build_dataset(
    run: Run, recipe: Recipe, prompts: Mapping[str, Prompt], chains: Iterable[Chain], selection: int = SELECTION
) -> dict[str, Any]:
    """Write the Parquet files and return the counts.

    Of rows that are alike, or too many of one prompt, those with the highest reward are kept. `chains` is iterated
    twice. `selection`: the rules to apply, 1 or 2 (`SELECTION`). The counts are rows by config and split, `dropped`
    chains by reason, and `uncompared`: sft rows by split that are revisions never compared with another clean text of
    their chain (`is_compared`). Raises DataError if a chain belongs to a test prompt or to no prompt, or if no training
    row is left.
    """
    dropped, candidates = Counter[str](), list[Candidate]()
    for chain in chains:
        candidate = candidate_of(chain, _prompt_of(chain, prompts), recipe)
        if isinstance(candidate, Candidate):
            candidates.append(candidate)
        else:
            dropped[candidate] += 1
    chosen, left_out = select_rows(candidates, recipe, selection)
    dropped += left_out
    uncompared, texts = Counter[str](), texts_of(recipe.chain)
    has_tools = any(prompt.tools for prompt in prompts.values())
    schemas = _schemas(has_tools, has_pairs=len(texts.pairs) > 1)
    writers = {name: _Writer(run["dataset"], name, schema) for name, schema in schemas.items()}
    try:
        for chain in chains:
            prompt = _prompt_of(chain, prompts)
            writers["chains"].add(prompt.split, _chain_row(prompt, chain))
            if (chain.prompt_id, chain.number) not in chosen:
                continue
            uncompared[prompt.split] += bool(chain.state_step) and not is_compared(chain)
            opening = texts.opening(prompt)
            for config, row in _rows_of(chain, prompt, opening, selection):
                writers[config].add(prompt.split, row)
    finally:
        counts = {name: writer.close() for name, writer in writers.items()}
    if not counts["sft"].get("train"):
        why = "; ".join(f"{n} {reason}" for reason, n in dropped.most_common()) or "there are no chains"
        raise DataError(
            f"no chain gives a training row: {why}",
            "Lower dataset.min_reward, add chain.steps or prompts, or look at some chains with `dsc try`.",
        )
    others = {"dropped": dict(dropped.most_common()), "uncompared": dict(+uncompared), "selection": selection}
    return counts | others


def _schemas(has_tools: bool, has_pairs: bool) -> dict[str, pa.Schema]:
    """Return the schemas of the configs; training rows have a column of tools if any prompt has some, steps of chains
    the number of their pair of texts if there are several."""
    schemas = dict(SCHEMAS)
    if has_tools:
        schemas = {name: schema.append(pa.field(*_TOOLS)) for name, schema in SCHEMAS.items() if name != "chains"}
        schemas["chains"] = SCHEMAS["chains"]
    if has_pairs:
        at = schemas["chains"].get_field_index("steps")
        step = pa.struct([*_STEP, ("pair", pa.int32())])
        schemas["chains"] = schemas["chains"].set(at, pa.field("steps", pa.list_(step)))
    return schemas


def _prompt_of(chain: Chain, prompts: Mapping[str, Prompt]) -> Prompt:
    prompt = prompts.get(chain.prompt_id)
    if prompt is None or prompt.split == "test":
        what = "a test prompt" if prompt else "no prompt of this run"
        raise DataError(
            f"chains.jsonl holds a chain of {what} ({chain.prompt_id})",
            "Remove chains.jsonl and sampling.done.json and sample again.",
        )
    return prompt


def _rows_of(
    chain: Chain, prompt: Prompt, opening: list[dict[str, str]], selection: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a chosen chain's rows, each with its config.

    No pair has a rejected answer with as high a reward as the chosen one. A first answer with a defect was not
    compared, so its pair has a config of its own.
    """
    final, first = chain.final_score.value, chain.answer_score.value
    common = {"prompt": opening, "prompt_id": prompt.id, "group": prompt.group, "chain": chain.number}
    common |= {"tools": json.dumps(prompt.tools, ensure_ascii=False)} if prompt.tools else {}
    yield "sft", common | {"completion": _assistant(chain.final), "reward": final, "first_reward": first}
    pair = common | {"chosen": _assistant(chain.final), "rejected": _assistant(chain.answer)}
    if not chain.state_step:
        return
    if chain.answer_defect and selection > 1:
        yield "repairs", pair | {"defect": chain.answer_defect}
    elif final is not None and first is not None and (final > first or selection == 1):
        yield "preference", pair | {"margin": final - first}


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _chain_row(prompt: Prompt, chain: Chain) -> dict[str, Any]:
    steps = [
        {
            "number": s.number,
            "critique": s.critique,
            "revision": s.revision,
            "raw": s.raw,
            "reward": s.score.value,
            "unscored_reason": s.score.reason,
            "defect": s.defect,
            "rejected": s.rejected,
            "pair": s.pair,
        }
        for s in chain.steps
    ]
    return {
        "prompt": prompt.transcript,
        "prompt_id": prompt.id,
        "group": prompt.group,
        "chain": chain.number,
        "answer": chain.answer,
        "answer_raw": chain.answer_raw,
        "answer_reward": chain.answer_score.value,
        "answer_unscored_reason": chain.answer_score.reason,
        "answer_defect": chain.answer_defect,
        "steps": steps,
        "final": chain.final,
        "final_reward": chain.final_score.value,
        "final_step": chain.state_step,
        "final_defect": chain.final_defect,
    }


def chain_of(row: Mapping[str, Any]) -> tuple[Prompt, Chain]:
    """Convert a row of the config `chains` back to its prompt and chain.

    The row has no split: the prompt gets "train", and the caller has to set the real one. The text of a conversation
    is its transcript.
    ValueError (pydantic's) or KeyError if the row has another form.
    """
    steps = [
        {key: s[key] for key in ("number", "critique", "revision", "raw", "defect", "rejected")}
        | {"pair": s.get("pair", 0)}
        | {"score": {"value": s["reward"], "reason": s["unscored_reason"]}}
        for s in row["steps"]
    ]
    chain = {key: row[key] for key in ("prompt_id", "answer", "answer_raw", "answer_defect")} | {"steps": steps}
    score = {"value": row["answer_reward"], "reason": row["answer_unscored_reason"]}
    prompt = {"id": row["prompt_id"], "text": row["prompt"], "group": row["group"], "split": "train"}
    return from_row(Prompt, prompt), from_row(Chain, chain | {"number": row["chain"], "answer_score": score})


class _Writer:
    """Writer of one config's Parquet files, one per split, in batches, so that memory use is constant."""

    def __init__(self, folder: Path, config: str, schema: pa.Schema) -> None:
        self._folder, self._schema = folder / config, schema
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._files: dict[str, pq.ParquetWriter] = {}
        self.counts: Counter[str] = Counter()
        for old in self._folder.glob("*.parquet"):  # from an earlier, interrupted attempt
            old.unlink()

    def add(self, split: str, row: dict[str, Any]) -> None:
        self.counts[split] += 1
        rows = self._rows.setdefault(split, [])
        rows.append(row)
        if len(rows) >= CHUNK_ROWS:
            self._flush(split)

    def _flush(self, split: str) -> None:
        if split not in self._files:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files[split] = pq.ParquetWriter(self._folder / f"{split}-00000-of-00001.parquet", self._schema)
        self._files[split].write_table(pa.Table.from_pylist(self._rows[split], schema=self._schema))
        self._rows[split] = []

    def close(self) -> dict[str, int]:
        for split, rows in self._rows.items():
            if rows:
                self._flush(split)
        for file in self._files.values():
            file.close()
        return dict(self.counts)


def read_dataset(folder: Path, config: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split of a written config; none if the split is empty."""
    path = folder / config / f"{split}-00000-of-00001.parquet"
    if path.is_file():
        for batch in pq.ParquetFile(path).iter_batches(CHUNK_ROWS):
            yield from batch.to_pylist()
