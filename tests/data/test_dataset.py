"""Chains become rows: kept answers only, never of a test prompt."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from datasets import load_dataset

from dsc_hub.acceptance import make_rule
from dsc_hub.chain.chain import NOT_BETTER, NOT_COMPARABLE
from dsc_hub.config import recipe_files
from dsc_hub.data import dataset
from dsc_hub.errors import DataError
from dsc_hub.records import Chain, Prompt, Score, Step
from dsc_hub.runs.run import Run

PROMPTS = {
    p.id: p
    for p in [
        Prompt("a", "Prompt a", "g1", "train"),
        Prompt("b", "Prompt b", "g2", "validation"),
        Prompt("t", "Prompt t", "g3", "test"),
    ]
}


def chain(
    prompt_id: str, first: float | None, revised: float | None, *, number: int = 0, defect: str = "", rejected: str = ""
) -> Chain:
    step = Step(1, "critique", f"revised {number}", Score(revised), "", rejected)
    return Chain(
        prompt_id, number, f"first {number}", Score(first, "" if first is not None else "no words"), defect, (step,)
    )


def build(tmp_path: Path, recipe_file: Path, chains: list[Chain], *overrides: str) -> dict:
    return dataset.build_dataset(Run(tmp_path), recipe_files.load_recipe_file(recipe_file, overrides), PROMPTS, chains)


def test_only_improved_clean_and_good_enough_chains_become_rows(tmp_path: Path, recipe_file: Path):
    chains = [
        chain("a", 0.1, 0.6, number=0),
        chain("a", 0.1, 0.3, number=1),
        chain("a", 0.7, 0.2, number=2, rejected="not accepted by the rule"),
        chain("a", 0.9, None, number=3, defect="empty", rejected="unscored"),
        chain("a", 0.9, 0.5, number=4, defect="cut at the length limit"),
        chain("b", -0.5, 0.8),
    ]
    counts = build(tmp_path, recipe_file, chains, "dataset.min_reward=0.4")
    assert counts["sft"] == {"train": 2, "validation": 1} and counts["chains"] == {"train": 5, "validation": 1}
    assert counts["dropped"] == {"reward below 0.4": 1, "no gain over the first answer": 1, "no clean final state": 1}
    assert sum(counts["sft"].values()) + sum(counts["dropped"].values()) == len(chains)
    rows = list(dataset.read_dataset(tmp_path / "dataset", "sft", "train"))
    assert [r["completion"][0]["content"] for r in rows] == ["revised 0", "revised 4"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Prompt a"}] and rows[0]["first_reward"] == 0.1
    pairs = list(dataset.read_dataset(tmp_path / "dataset", "preference", "train"))
    assert (pairs[0]["chosen"][0]["content"], pairs[0]["rejected"][0]["content"]) == ("revised 0", "first 0") and pairs[
        0
    ]["margin"] == pytest.approx(0.5)


def test_what_was_never_compared_with_anything_is_counted_and_an_unscored_answer_gives_no_gain(
    tmp_path: Path, recipe_file: Path
):
    def later(rejected: str, number: int) -> Chain:
        once = chain("a", 0.9, 0.5, number=number, defect="empty")
        return Chain(*(getattr(once, f) for f in ("prompt_id", "number", "answer", "answer_score", "answer_defect")),
                     (*once.steps, Step(2, "c", "second", Score(0.1), "", rejected)))  # fmt: skip

    chains = [
        chain("a", 0.1, 0.6, number=0),
        chain("a", 0.9, 0.5, number=1, defect="empty"),  # its only clean text
        later(NOT_BETTER, 2),  # a later one was worse: compared
        later("repeats itself", 3),
        chain("a", None, 0.9, number=4),  # as the rule `always` keeps it
        chain("a", None, 0.9, number=5, rejected=NOT_COMPARABLE),
    ]
    counts = build(tmp_path, recipe_file, chains)
    assert counts["sft"] == {"train": 4} and counts["uncompared"] == {"train": 2}
    assert counts["dropped"] == {dataset.NOT_COMPARED: 1, "unscored": 1}
    every = build(tmp_path, recipe_file, chains, "dataset.min_gain=null")
    assert every["sft"] == {"train": 5} and every["uncompared"] == {"train": 3}
    # a first answer that stands since nothing clean came after it is no revision
    stays = chain("a", 0.4, 0.9, number=6, rejected="repeats itself")
    assert build(tmp_path, recipe_file, [stays], "dataset.min_gain=null")["uncompared"] == {}


@pytest.mark.parametrize(("min_gain", "within"), [("auto", True), ("0.0", False)])
def test_under_metropolis_the_rows_are_draws_from_the_target_unless_a_gain_is_asked_for(
    tmp_path: Path, recipe_file: Path, min_gain: str, within: bool
):
    """Five states, proposals from p, where the rule is exact: total variation distance of the rows' texts from p
    exp(r/T)."""
    p = dict(zip("abcde", (0.35, 0.30, 0.20, 0.10, 0.05), strict=True))
    reward = dict(zip("abcde", (-0.6, 0.0, 0.4, 0.1, 0.9), strict=True))
    dice, rule = random.Random(7), make_rule("metropolis", 0.5)
    chains = []
    for n in range(6000):
        first, *proposals = dice.choices(list(p), list(p.values()), k=13)
        state, steps = first, []
        for i, text in enumerate(proposals, 1):
            kept = rule(reward[state], reward[text], dice.random())
            steps.append(Step(i, "c", text, Score(reward[text]), "", "" if kept else NOT_BETTER))
            state = text if kept else state
        chains.append(Chain("a", n, first, Score(reward[first]), "", tuple(steps)))
    counts = build(tmp_path, recipe_file, chains, "chain.acceptance=metropolis", f"dataset.min_gain={min_gain}")
    texts = [row["completion"][0]["content"] for row in dataset.read_dataset(tmp_path / "dataset", "sft", "train")]
    target = {s: p[s] * math.exp(reward[s] / 0.5) for s in p}
    total = sum(target.values())
    distance = sum(abs(texts.count(s) / len(texts) - target[s] / total) for s in p) / 2
    assert (distance < 0.03) if within else (distance > 0.08), distance
    assert (counts["sft"]["train"] == len(chains)) == within


def test_a_chain_of_a_test_prompt_is_refused(tmp_path: Path, recipe_file: Path):
    with pytest.raises(DataError, match="a chain of a test prompt"):
        build(tmp_path, recipe_file, [chain("a", 0, 1), chain("t", 0, 1)])


def pairs_of(folder: Path, config: str) -> list[tuple[str, str]]:
    rows = dataset.read_dataset(folder / "dataset", config, "train")
    return [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in rows]


def test_in_no_pair_the_rejected_answer_has_as_high_a_reward(tmp_path: Path, recipe_file: Path):
    chains = [
        chain("a", 0.1, 0.6, number=0),
        chain("a", 0.7, 0.7, number=1),
        chain("a", 0.9, 0.2, number=2),  # `always` accepts it
        chain("b", 0.0, 0.5),
    ]
    overrides = ("chain.acceptance=always", "dataset.min_gain=null")
    counts = build(tmp_path, recipe_file, chains, *overrides)
    assert counts["sft"] == {"train": 3, "validation": 1} and counts["preference"] == {"train": 1, "validation": 1}
    assert pairs_of(tmp_path, "preference") == [("revised 0", "first 0")] and counts["repairs"] == {}


def test_pairs_beside_a_first_answer_with_a_defect_are_a_config_of_their_own(tmp_path: Path, recipe_file: Path):
    """Whatever the scorer says of the defective text: it was not compared."""
    chains = [
        chain("a", 0.9, 0.6, number=0, defect="repeats itself"),
        chain("a", None, 0.5, number=1, defect="empty"),
        chain("a", -0.9, 0.4, number=2, defect="repeats itself", rejected=NOT_BETTER),
        chain("a", 0.0, 0.6, number=3),
    ]
    counts = build(tmp_path, recipe_file, chains)
    assert counts["repairs"] == {"train": 2} and counts["preference"] == {"train": 1}
    assert pairs_of(tmp_path, "repairs") == [("revised 0", "first 0"), ("revised 1", "first 1")]
    rows = dataset.read_dataset(tmp_path / "dataset", "repairs", "train")
    assert [r["defect"] for r in rows] == ["repeats itself", "empty"]


def twice(number: int, revised: float, text: str) -> Chain:
    return Chain("a", number, "first", Score(0.0), "", (Step(1, "c", text, Score(revised), "", ""),))


def test_an_answer_stands_once_under_its_prompt_except_among_draws(tmp_path: Path, recipe_file: Path):
    chains = [twice(0, 0.5, "Good."), twice(1, 0.5, "Good."), twice(2, 0.5, "Fine.")]
    counts = build(tmp_path, recipe_file, chains)
    assert counts["sft"] == {"train": 2} and counts["dropped"] == {"the same answer as another row of its prompt": 1}
    assert [r["chain"] for r in dataset.read_dataset(tmp_path / "dataset", "sft", "train")] == [0, 2]
    # Draws from the target: a text that comes up twice has twice the weight.
    assert build(tmp_path, recipe_file, chains, "chain.acceptance=metropolis")["sft"] == {"train": 3}


def test_of_too_many_rows_of_a_prompt_the_best_are_kept(tmp_path: Path, recipe_file: Path):
    chains = [chain("a", 0, reward, number=n) for n, reward in enumerate((0.2, 0.9, 0.5, 0.9, 0.1))]
    counts = build(tmp_path, recipe_file, [*chains, chain("b", 0, 0.1)], "dataset.rows_per_prompt=2")
    assert counts["sft"] == {"train": 2, "validation": 1} and counts["dropped"] == {"2 better rows of its prompt": 3}
    assert [r["chain"] for r in dataset.read_dataset(tmp_path / "dataset", "sft", "train")] == [1, 3]


def test_rows_of_older_datasets_can_be_made_again_by_their_own_rules(tmp_path: Path, recipe_file: Path):
    chains = [twice(0, 0.5, "Good."), twice(1, 0.5, "Good."), chain("a", 0.9, 0.6, number=2, defect="empty")]
    recipe = recipe_files.load_recipe_file(recipe_file)
    counts = dataset.build_dataset(Run(tmp_path), recipe, PROMPTS, chains, selection=1)
    assert counts["sft"] == {"train": 3} and counts["preference"] == {"train": 3} and counts["selection"] == 1
    assert [r["margin"] for r in dataset.read_dataset(tmp_path / "dataset", "preference", "train")][2] < 0


def test_no_row_left_is_an_error_that_says_why(tmp_path: Path, recipe_file: Path):
    with pytest.raises(DataError, match="1 no gain over the first answer.*\n.*dsc try"):
        build(tmp_path, recipe_file, [chain("a", 0.5, 0.1, rejected="not accepted by the rule"), chain("b", 0, 1)])


def test_a_broken_off_attempt_leaves_nothing_behind(tmp_path: Path, recipe_file: Path):
    build(tmp_path, recipe_file, [chain("a", 0, 1), chain("b", 0, 1)])
    counts = build(tmp_path, recipe_file, [chain("a", 0, 1)])
    assert counts["sft"] == {"train": 1} and not list(dataset.read_dataset(tmp_path / "dataset", "sft", "validation"))


def test_the_files_load_with_typed_columns_as_the_hub_will_load_them(tmp_path: Path, recipe_file: Path):
    unscored = chain("a", None, 1.0, rejected=NOT_COMPARABLE)
    build(tmp_path, recipe_file, [unscored, chain("a", 0, 1, number=1), chain("b", 0, 1)])
    files = {
        "train": str(tmp_path / "dataset/chains/train-*.parquet"),
        "validation": str(tmp_path / "dataset/chains/validation-*.parquet"),
    }
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    row = loaded["train"][0]
    assert (
        row["answer_reward"] is None
        and row["answer_unscored_reason"] == "no words"
        and row["steps"][0]["reward"] == 1.0
    )
    assert loaded["train"].features == loaded["validation"].features


def test_rows_are_written_in_batches(tmp_path: Path, recipe_file: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dataset, "CHUNK_ROWS", 7)
    counts = build(tmp_path, recipe_file, [chain("a", 0, 1, number=n) for n in range(50)])
    assert counts["sft"]["train"] == 50 and [
        r["chain"] for r in dataset.read_dataset(tmp_path / "dataset", "sft", "train")
    ] == list(range(50))


def test_no_phrase_stands_in_more_rows_than_the_limit(tmp_path: Path, recipe_file: Path):
    """Of rows that share four words, of whatever film, the two best are kept; validation counts for itself."""
    films = {
        f: Prompt(f, f"Review {f}.", f, s)
        for f, s in zip(("ax", "bx", "cx", "dx"), ("train",) * 3 + ("validation",), strict=True)
    }

    def says(film: str, text: str, number: int = 0, reward: float = 0.8) -> Chain:
        return Chain(film, number, "first", Score(0.0), "", (Step(1, "c", text, Score(reward), "", ""),))

    chains = [
        says("ax", "ax is a masterpiece of light", reward=0.7),
        says("bx", "They say bx is a masterpiece too"),
        says("cx", "And cx is a masterpiece"),
        says("cx", "cx has a fine score", 1),
        says("dx", "dx is a masterpiece"),
    ]
    counts = dataset.build_dataset(
        Run(tmp_path), recipe_files.load_recipe_file(recipe_file, ["dataset.phrase_limit=2"]), films, chains
    )
    assert counts["sft"] == {"train": 3, "validation": 1} and counts["chains"] == {"train": 4, "validation": 1}
    assert counts["dropped"] == {"a phrase that 2 rows have already": 1}
    kept = [r["completion"][0]["content"] for r in dataset.read_dataset(tmp_path / "dataset", "sft", "train")]
    assert kept == ["They say bx is a masterpiece too", "And cx is a masterpiece", "cx has a fine score"]
    everything = dataset.build_dataset(Run(tmp_path), recipe_files.load_recipe_file(recipe_file), films, chains)
    assert everything["sft"] == {"train": 4, "validation": 1}
