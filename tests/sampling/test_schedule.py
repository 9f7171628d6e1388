"""Sampling for a number of rows, or within a budget: exactly so many, the same ones at any speed, and none preferred."""

from __future__ import annotations

import asyncio
import heapq
import os
import random
import signal
import statistics
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsc_hub.chain.chain import NOT_BETTER
from dsc_hub.config import recipe_files
from dsc_hub.config.recipe import Recipe
from dsc_hub.data.dataset import build_dataset, candidate_of, read_dataset, select_rows
from dsc_hub.data.dataset import chain_of as chain_of_row
from dsc_hub.errors import ConfigError
from dsc_hub.inference.client import Completion
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.records import Chain, Prompt, Score, Step
from dsc_hub.runs.cost import spent_of
from dsc_hub.runs.row_index import RowIndex, request_key
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample, schedule
from tests.conftest import ScriptedModel, length_score
from tests.sampling.test_sample import setup, sorted_rows


class Uneven(ScriptedModel):
    """Answers after a time that depends on the request and on this model's own chance."""

    def __init__(self, rng: random.Random, most_s: float = 0.004, answers: int = 10**9) -> None:
        super().__init__()
        self._rng, self._most_s, self.left = rng, most_s, answers

    async def __call__(self, messages: list[dict[str, str]], seed: int) -> Completion:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        self.pause = self._rng.uniform(0, self._most_s)
        return await super().__call__(messages, seed)


class Failing(ScriptedModel):
    """Refuses the requests whose seed is a multiple of a number."""

    def __init__(self, each: int) -> None:
        super().__init__()
        self._each = each

    async def __call__(self, messages: list[dict[str, str]], seed: int) -> Completion:
        if seed % self._each == 0:
            failed = RequestFailed("refused", refused=True)
            failed.others_answered = True
            raise failed
        return await super().__call__(messages, seed)


def run_to_its_end(folder: Path, recipe_file: Path, model: ScriptedModel, level: int, *overrides: str):
    run, r, some = setup(recipe_file, folder, "chain.chains_per_prompt=40", *overrides)
    plan = schedule.Schedule(r, {p.id: p for p in some})
    tally = asyncio.run(sample.sample(run, r, some, model, length_score, schedule=plan, level=lambda: level))
    return run, r, {p.id: p for p in some}, tally


def rebuilt(run: Run, recipe: Recipe, prompts: dict[str, Prompt], folder: Path) -> dict:
    """Make the dataset anew from the chains that are published with it, as `dsc verify` does."""
    rows = [row for split in ("train", "validation") for row in read_dataset(run["dataset"], "chains", split)]
    again = build_dataset(Run(folder), recipe, prompts, [chain_of_row(row)[1] for row in rows])
    for file in run["dataset/sft"].iterdir():
        assert read_sorted(folder / "dataset" / "sft" / file.name) == read_sorted(file)
    return again


def read_sorted(file: Path) -> list[str]:
    return sorted(map(str, pq.read_table(file).to_pylist()))


PAIRS = "chain.critique=['What is wrong?', 'Who is hurt?', 'Is it kind?']"


@pytest.mark.parametrize("limit", ["dataset.phrase_limit=null", "dataset.rows_per_prompt=2", PAIRS])
def test_exactly_so_many_rows_of_the_same_chains_however_many_are_in_flight(
    recipe_file: Path, tmp_path: Path, limit: str
):
    files, turns = [], []
    for level in (1, 7, 60):
        run, r, prompts, tally = run_to_its_end(
            tmp_path / f"run{level}", recipe_file, Uneven(random.Random(level)), level, "dataset.rows=9", limit
        )
        chains = list(sample.read_chains(run))
        assert tally.ending == schedule.Ending("rows", len(chains)) and tally.failed == 0
        counts = build_dataset(run, r, prompts, chains)
        assert counts["sft"]["train"] == 9
        assert rebuilt(run, r, prompts, tmp_path / f"again{level}") == counts
        files.append(sorted_rows(run["chains.jsonl"]))
        turns.append(len(list(run.rows("turns.jsonl"))))
    assert files[0] == files[1] == files[2]
    assert turns[0] <= turns[2]


def test_after_any_number_of_kills_the_rows_are_the_same(recipe_file: Path, tmp_path: Path):
    whole, *_ = run_to_its_end(tmp_path / "whole", recipe_file, Uneven(random.Random(0)), 8, "dataset.rows=9")
    rng, kills = random.Random(1), 0
    while True:
        model = Uneven(rng, answers=rng.randint(5, 40))
        try:
            run, r, prompts, _ = run_to_its_end(tmp_path / "killed", recipe_file, model, 8, "dataset.rows=9")
            break
        except RuntimeError:
            kills += 1
    assert kills >= 2 and sorted_rows(run["chains.jsonl"]) == sorted_rows(whole["chains.jsonl"])
    assert build_dataset(run, r, prompts, list(sample.read_chains(run)))["sft"]["train"] == 9
    again, *_ = run_to_its_end(tmp_path / "killed", recipe_file, Uneven(rng, answers=0), 8, "dataset.rows=9")
    assert sorted_rows(again["chains.jsonl"]) == sorted_rows(whole["chains.jsonl"])  # and asks nothing more


def test_a_failed_request_is_no_end(recipe_file: Path, tmp_path: Path):
    run, _, _, tally = run_to_its_end(tmp_path / "run", recipe_file, Failing(5), 8, "dataset.rows=9")
    assert tally.ending and tally.ending.by == "rows" and tally.failed
    assert tally.ending.chains > len(list(sample.read_chains(run)))


# -- simulated chains


def chain_of(key: tuple[str, int], reward: float, is_better: bool = True, pair: int = 0) -> Chain:
    rejected = "" if is_better else NOT_BETTER
    step = Step(1, "why", f"text {key} {reward}", Score(reward), "", rejected, pair=pair)
    return Chain(key[0], key[1], "first", Score(-1.0), "", (step,))


def recipe_of(recipe_file: Path, *overrides: str) -> Recipe:
    return recipe_files.load_recipe_file(recipe_file, ["chain.chains_per_prompt=200", *overrides])


def prompts_of(count: int) -> dict[str, Prompt]:
    return {f"p{i}": Prompt(f"p{i}", f"Tell of {i}.", f"g{i}", "train") for i in range(count)}


def simulate(plan: schedule.Schedule, rng: random.Random, level: int, outcome, seconds) -> list[Chain]:
    """Run a schedule with `level` chains at once: `outcome(key)` is a chain, which takes `seconds(chain)`."""
    plan.resume([])
    now, in_flight, done = 0.0, [], {}
    while True:
        while len(in_flight) < level and (job := next(plan)) is not None:
            chain = outcome((job[0].id, job[1]))
            heapq.heappush(in_flight, (now + seconds(chain), rng.random(), chain))
        if not in_flight or plan.ended == "rows":
            break
        now, _, chain = heapq.heappop(in_flight)
        done[chain.prompt_id, chain.number] = chain
        plan.finished(chain)
    return [done[key] for key in plan.kept]


def test_quick_chains_are_not_preferred(recipe_file: Path):
    """Chains with high rewards are slow: whoever takes the first rows to come takes the bad ones."""
    recipe = recipe_of(recipe_file, "dataset.rows=60", "dataset.min_gain=null")
    kept, quickest, grid = [], [], []
    for seed in range(60):
        rng = random.Random(seed)
        rewards: dict[tuple[str, int], float] = {}

        def outcome(key, rng=rng, rewards=rewards):
            rewards[key] = rng.gauss(0, 1)
            return chain_of(key, rewards[key], is_better=rng.random() < 0.5)

        finished: list[Chain] = []

        def seconds(chain, finished=finished):
            return 2.0 ** (chain.steps[0].score.value or 0)

        plan = schedule.Schedule(recipe, prompts_of(30))
        chains = simulate(plan, rng, 50, outcome, seconds)
        kept += [c.final_score.value for c in chains if c.state_step]
        plan = schedule.Schedule(recipe, prompts_of(30))
        everything = [outcome((f"p{i}", n)) for i in range(30) for n in range(8)]
        grid += [c.final_score.value for c in everything if c.state_step]
        first = sorted(everything[:150], key=seconds)
        quickest += [c.final_score.value for c in first if c.state_step][:60]
    error = statistics.stdev(grid) * (1 / len(kept) + 1 / len(grid)) ** 0.5
    assert abs(statistics.mean(kept) - statistics.mean(grid)) < 3 * error
    assert abs(statistics.mean(quickest) - statistics.mean(grid)) > 6 * error  # what the rule prevents


def test_a_prompt_that_gives_no_row_is_given_up(recipe_file: Path):
    recipe, prompts = recipe_of(recipe_file, "dataset.rows=1000"), prompts_of(100)
    barren = {f"p{i}" for i in range(25)}
    rng = random.Random(0)
    plan = schedule.Schedule(recipe, prompts)
    chains = simulate(
        plan,
        rng,
        40,
        lambda key: chain_of(key, 1.0 + rng.random(), is_better=key[0] not in barren and rng.random() < 0.5),
        lambda chain: rng.random(),
    )
    each = Counter(c.prompt_id for c in chains)
    assert plan.ended == "rows" and plan.rows == 1000
    assert max(each[p] for p in barren) < min(each[p] for p in prompts if p not in barren)
    assert not any(p in each and each[p] > 16 for p in barren)


def test_where_no_prompt_gives_enough_it_ends_with_all_chains(recipe_file: Path):
    recipe = recipe_of(recipe_file, "dataset.rows=400", "chain.chains_per_prompt=3")
    plan = schedule.Schedule(recipe, prompts_of(20))
    chains = simulate(plan, random.Random(0), 16, lambda key: chain_of(key, 1.0), lambda chain: 1.0)
    assert plan.ended == "chains" and len(chains) == 60 and plan.rows == 60


def test_near_the_end_no_more_chains_begin_than_the_missing_rows_need(recipe_file: Path):
    begun = Counter[str]()

    def outcome(key):
        begun["chains"] += 1
        return chain_of(key, begun["chains"] / 1e4)

    rng = random.Random(0)
    plan = schedule.Schedule(recipe_of(recipe_file, "dataset.rows=200"), prompts_of(100))
    chains = simulate(plan, rng, 256, outcome, lambda chain: rng.random())
    assert len(chains) == 200 and begun["chains"] <= schedule.SPARE * 200


def test_one_slow_chain_does_not_let_the_server_stand_still(recipe_file: Path):
    begun: list[tuple[str, int]] = []
    finished: list[tuple[str, int]] = []
    rng = random.Random(0)

    def outcome(key):
        begun.append(key)
        return chain_of(key, rng.random(), is_better=rng.random() < 0.3)

    def seconds(chain):
        return 1000.0 if chain.key == begun[0] else 1.0

    plan = schedule.Schedule(recipe_of(recipe_file, "dataset.rows=72"), prompts_of(50))
    put = plan.finished
    plan.finished = lambda chain: (finished.append(chain.key), put(chain))
    chains = simulate(plan, rng, 64, outcome, seconds)
    # All that the rows take is finished when the slow one is, but for what the gap in front of it makes uncertain.
    assert finished.index(begun[0]) > 0.8 * len(chains) and plan.rows == 72


def timed(plan: schedule.Schedule, rng: random.Random, level: int, outcome) -> tuple[list[Chain], float, int]:
    """Run a schedule with chains of about one second: the chains that count, the seconds, how many chains ran alone."""
    now, alone, in_flight, done = 0.0, 0, [], []
    while True:
        while len(in_flight) < level and (job := next(plan)) is not None:
            heapq.heappush(in_flight, (now + rng.uniform(0.6, 1.4), rng.random(), (job[0].id, job[1])))
        if not in_flight or plan.ended:
            return done, now, alone
        alone += len(in_flight) == 1
        now, _, key = heapq.heappop(in_flight)
        if (chain := outcome(key)) is None:
            plan.failed(key)
        else:
            done.append(chain)
            plan.finished(chain)


def test_failed_chains_that_are_retried_are_retried_together(recipe_file: Path):
    recipe, prompts, rng = recipe_of(recipe_file, "dataset.rows=400"), prompts_of(200), random.Random(0)
    good = {(id_, n): rng.random() < 0.3 for id_ in prompts for n in range(8)}
    fails = {key for key in good if rng.random() < 0.1}
    plan = schedule.Schedule(recipe, prompts)
    plan.resume([])
    done, seconds, _ = timed(plan, rng, 128, lambda key: None if key in fails else chain_of(key, 1.0, good[key]))
    assert plan.ended == "rows" and plan.rows_so_far == plan.rows == 400
    plan = schedule.Schedule(recipe, prompts)
    plan.resume(done)
    _, again, _ = timed(plan, rng, 128, lambda key: chain_of(key, 1.0, good[key]))
    # A tenth of the chains is sampled again: one after the other they would take ten times as long as all of them.
    assert plan.ended == "rows" and again < seconds


def test_where_rows_become_rarer_the_server_does_not_stand_still_at_the_end(recipe_file: Path):
    recipe, prompts, rng = (
        recipe_of(recipe_file, "dataset.rows=2000", "chain.chains_per_prompt=64"),
        prompts_of(200),
        random.Random(0),
    )

    def outcome(key):
        return chain_of(key, rng.random(), is_better=rng.random() < 0.6 * max(0.15, 1 - key[1] / 30))

    plan = schedule.Schedule(recipe, prompts)
    plan.resume([])
    _, _, alone = timed(plan, rng, 128, outcome)
    assert plan.ended == "rows" and alone < 8


@pytest.mark.parametrize("level", [1, 16, 64, 256])
@pytest.mark.parametrize("budget", [20_000, 100_000])
def test_the_budget_is_kept_however_long_the_chains_in_flight_are(recipe_file: Path, level: int, budget: int):
    """Nine of ten chains have one turn, the others thirteen: those in flight are the long ones."""
    recipe = recipe_of(recipe_file, f"budget.tokens={budget}", "generation.max_new_tokens=100", "chain.steps=6")
    rng, used = random.Random(level), Counter[str]()
    plan = schedule.Schedule(recipe, prompts_of(50), tokens=1000)

    def outcome(key):
        return chain_of(key, 1.0)

    def seconds(chain):
        turns = 1 if rng.random() < 0.9 else 13
        for _ in range(turns):
            plan.used(chain.key, 100)
            used["tokens"] += 100
        return turns

    chains = simulate(plan, rng, level, outcome, seconds)
    assert plan.ended == "budget" and used["tokens"] + 1000 <= budget and len(chains) == len(plan.kept)
    assert used["tokens"] + 1000 > budget - 14 * 100


def test_a_spent_budget_begins_nothing(recipe_file: Path):
    plan = schedule.Schedule(recipe_of(recipe_file, "budget.hours=2"), prompts_of(5), hours=2.5)
    assert simulate(plan, random.Random(0), 4, lambda key: pytest.fail("it began"), lambda c: 1.0) == []
    assert plan.ended == "budget"


def test_a_budget_that_is_used_up_loses_no_chain_at_the_next_start(recipe_file: Path, tmp_path: Path):
    """Some failed, so that there are gaps in the order, and nothing is left to ask for them again."""
    override = ("budget.tokens=3000", "chain.chains_per_prompt=40", "generation.max_new_tokens=20")
    run, r, some = setup(recipe_file, tmp_path / "run", *override)
    prompts = {p.id: p for p in some}

    plan = schedule.Schedule(r, prompts)
    first = asyncio.run(sample.sample(run, r, some, Failing(9), length_score, schedule=plan, level=lambda: 8))
    assert first.ending and first.ending.by == "budget" and first.failed > 3
    tokens, _ = spent_of(run, "sampling", "turns.jsonl")
    assert 2500 < tokens <= 3000
    before = sorted_rows(run["chains.jsonl"])
    assert first.ending.chains == len(before) + len(list(run.rows("failed.jsonl")))
    plan = schedule.Schedule(r, prompts, tokens=3000)
    again = asyncio.run(sample.sample(run, r, some, Failing(9), length_score, schedule=plan, level=lambda: 8))
    assert again.ending == first.ending and sorted_rows(run["chains.jsonl"]) == before


def test_turns_of_other_runs_are_no_part_of_the_budget(recipe_file: Path, tmp_path: Path):
    other, r, some = setup(recipe_file, tmp_path / "other", "chain.chains_per_prompt=3")
    asyncio.run(sample.sample(other, r, some, ScriptedModel(), length_score))
    known = RowIndex([other.rows("turns.jsonl")], request_key)
    run, r, some = setup(
        recipe_file, tmp_path / "run", "chain.chains_per_prompt=6", "budget.tokens=1000", "generation.max_new_tokens=20"
    )
    plan = schedule.Schedule(r, {p.id: p for p in some})
    tally = asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score, known=known, schedule=plan))
    assert tally.reused_turns >= 100 and tally.new_tokens <= 1000
    assert spent_of(run, "sampling", "turns.jsonl")[0] == tally.new_tokens


def test_ctrl_c_while_the_last_rows_come_is_still_ctrl_c(recipe_file: Path, tmp_path: Path):
    class Pressed(ScriptedModel):
        async def __call__(self, messages: list[dict[str, str]], seed: int) -> Completion:
            if len(self.seeds) == 30:
                os.kill(os.getpid(), signal.SIGINT)
            return await super().__call__(messages, seed)

    for rows in (1, 3, 9):
        _, _, _, tally = run_to_its_end(tmp_path / f"run{rows}", recipe_file, Pressed(), 40, f"dataset.rows={rows}")
        assert tally.interrupted


def test_a_prompt_with_all_its_rows_is_one_with_rows_and_not_with_candidates(recipe_file: Path):
    """Twenty phrases, each in three rows at most: of all candidates few are rows."""
    recipe = recipe_of(recipe_file, "dataset.rows=55", "dataset.rows_per_prompt=1", "dataset.phrase_limit=3")
    rng, prompts = random.Random(0), prompts_of(60)

    def outcome(key):
        name = "abcdefghijklmnopqrst"[rng.randrange(20)]
        text = f"{name}one {name}two {name}three {name}four word{rng.randrange(10**9)}"
        step = Step(1, "why", text, Score(rng.random()), "", "")
        return Chain(key[0], key[1], "first", Score(-1.0), "", (step,))

    plan = schedule.Schedule(recipe, prompts)
    chains = simulate(plan, rng, 64, outcome, lambda chain: rng.random())
    everything = [outcome((p, n)) for p in prompts for n in range(200)]
    chosen, _ = select_rows([c for x in everything if (c := candidate_of(x, prompts[x.prompt_id], recipe))], recipe)
    assert len(chosen) >= 55 and plan.ended == "rows" and len(chains) < 3000


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dataset.rows=5", "rounds=2"], "dataset.rows and budget are of one sampling"),
        (["budget.tokens=0"], "budget.tokens"),
        (["budget.tokens=600"], r"less than one chain may take \(640\)"),
        (["chain.good_enough=0.1", "dataset.min_reward=0.5"], "which gives no row"),
        (["budget={}"], "give tokens, hours or both"),
        (["budget={tokens: null}"], "give tokens, hours or both"),
        (["dataset.rows=0"], "dataset.rows"),
        (["chain.acceptance=metropolis", "chain.good_enough=0.5"], "good_enough"),
    ],
)
def test_what_does_not_go_together_is_refused(recipe_file: Path, overrides: list[str], named: str):
    with pytest.raises(ConfigError, match=named):
        recipe_files.load_recipe_file(recipe_file, overrides)


# -- several texts


def test_texts_that_give_more_rows_are_drawn_more_often(recipe_file: Path):
    gives, rng = [0.1, 0.6, 0.2], random.Random(0)
    plan = schedule.Schedule(recipe_of(recipe_file, "dataset.rows=400", PAIRS), prompts_of(60))

    def outcome(key):
        pair = plan.choose(*key, 1)
        return chain_of(key, rng.random(), rng.random() < gives[pair], pair)

    chains = simulate(plan, rng, 60, outcome, lambda chain: rng.random())
    drawn = [Counter(c.steps[0].pair for c in part) for part in (chains[:100], chains[-300:])]
    assert max(drawn[0].values()) < 60 and drawn[1][1] > 240
    assert len(chains) < 400 / 0.45  # an even choice takes 400 / 0.3


def test_without_a_number_of_rows_they_are_drawn_evenly(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=20", PAIRS)
    asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    chains = list(sample.read_chains(run))
    drawn = Counter(step.pair for c in chains for step in c.steps)
    assert sorted(drawn) == [0, 1, 2] and min(drawn.values()) > 0.8 * max(drawn.values())
    prompts = {p.id: p for p in some}
    build_dataset(run, r, prompts, chains)
    rows = [row for split in ("train", "validation") for row in read_dataset(run["dataset"], "chains", split)]
    assert sorted(map(str, (chain_of_row(row)[1] for row in rows))) == sorted(map(str, chains))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[a, b, c]", "3 critiques and 2 revisions"),
        ("[]", "a text, or a list of texts"),
        ("[a, 3]", "text 2 of 2: should be a text, or a list of texts, got 3"),
        ("3", "a text, or a list of texts"),
        ("['', b]", "text 1 of 2: should not be empty"),
        ("['look at {anwser}', b]", "text 1 of 2: unknown placeholder {anwser}; did you mean {answer}"),
    ],
)
def test_lists_of_texts_that_do_not_fit_are_refused(recipe_file: Path, text: str, named: str):
    with pytest.raises(ConfigError, match=named):
        recipe_files.load_recipe_file(recipe_file, [f"chain.critique={text}", "chain.revision=[one, two]"])


def test_a_list_of_one_text_is_that_text(recipe_file: Path):
    r = recipe_files.load_recipe_file(recipe_file, ["chain.critique=['Why?']"])
    assert r.chain.critique == "Why?" and len(r.chain.pairs) == 1


# -- an answer that is good enough


def test_a_good_answer_is_not_revised(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(
        recipe_file, tmp_path / "run", "chain.chains_per_prompt=8", "chain.steps=3", "chain.good_enough=0.8"
    )
    tally = asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    chains = list(sample.read_chains(run))
    assert {len(c.steps) for c in chains} == {0, 1, 2, 3}
    for chain in chains:
        before_last = chain.reward_after(len(chain.steps) - 1) if chain.steps else None
        assert before_last is None or before_last < 0.8
        assert len(chain.steps) == 3 or (chain.final_score.value or 0) >= 0.8
    assert len(list(run.rows("turns.jsonl"))) == sum(1 + 2 * len(c.steps) for c in chains)
    group_of = {p.id: p.group for p in some}.__getitem__
    from dsc_hub.sampling import summary

    numbers = summary.chain_numbers(sample.read_chains(run), group_of, tally.total, r.chain)
    proposals = [step["proposals"] for step in numbers["steps"]]
    assert proposals == [sum(len(c.steps) > i for c in chains) for i in range(3)] and proposals[0] < len(chains)
    assert numbers["steps"][2]["reward_state"]["n"] == sum(c.reward_after(3) is not None for c in chains)


def test_ending_chains_at_the_highest_reward_there_is_changes_no_final_answer(recipe_file: Path, tmp_path: Path):
    """As the recipes `privacy` and `safety` do: a revision replaces an answer for a higher reward alone."""

    async def score(text: str, prompt: object = None) -> Score:
        return Score(min(0.5, (await length_score(text)).value or 0.0))  # half of the texts have the highest one

    ends, turns = [], []
    for enough in ("null", "0.5"):
        given = ["chain.chains_per_prompt=8", "chain.steps=3", f"chain.good_enough={enough}"]
        run, r, some = setup(recipe_file, tmp_path / enough, *given)
        asyncio.run(sample.sample(run, r, some, ScriptedModel(), score))
        chains = list(sample.read_chains(run))
        ends.append({(c.prompt_id, c.number): (c.final, c.final_score, c.answer, c.state_step) for c in chains})
        turns.append(len(list(run.rows("turns.jsonl"))))
    assert ends[0] == ends[1] and len(ends[0]) == 8 * len(some)
    assert {final_score.value for _, final_score, *_ in ends[0].values()} > {0.5} and turns[1] < turns[0]


def test_a_run_without_a_number_of_rows_is_as_before(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=3")
    tally = asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    assert tally.ending is None and tally.finished == 3 * len(some)
    step = next(iter(run.rows("chains.jsonl")))["steps"][0]
    assert list(step) == ["number", "critique", "revision", "score", "defect", "rejected", "raw"]
    assert not any("taken_over" in row for row in run.rows("turns.jsonl"))
