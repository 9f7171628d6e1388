"""Sampling with a scripted model: nothing lost, nothing twice, and the same bytes after a kill."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.chain.chain import LOST_MEANING
from dsc_hub.config import recipe_files
from dsc_hub.config.recipe import Recipe
from dsc_hub.data.prompts import load_prompts
from dsc_hub.errors import RunError, ServingError
from dsc_hub.inference.client import Completion
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.metrics.batching import BatchScorer
from dsc_hub.records import Prompt, Score
from dsc_hub.runs.metrics_schema import Metrics, Sampling
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample, schedule, summary
from dsc_hub.sampling.progress import SamplingProgress, TurnsLeft
from tests import fixture_run
from tests.conftest import ROOT, ScriptedModel, length_score


def setup(recipe_file: Path, folder: Path, *overrides: str) -> tuple[Run, Recipe, list[Prompt]]:
    r = recipe_files.load_recipe_file(recipe_file, overrides)
    found, _ = load_prompts(r.prompts, recipe_file.parent, r.seed)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder), r, [p for p in found if p.split != "test"]


class Breaking(ScriptedModel):
    """Answers so many requests, and fails all that come after with the same error."""

    def __init__(self, answers: int, error: Exception) -> None:
        super().__init__()
        self.asked, self._answers, self._error = 0, answers, error

    async def __call__(self, messages: list[dict[str, str]], seed: int) -> Completion:
        self.asked += 1
        if self.asked > self._answers:
            raise self._error
        return await super().__call__(messages, seed)


def sorted_rows(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines())


def test_every_chain_and_turn_is_written_once_and_counts_add_up(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=3", "chain.steps=2")
    model = ScriptedModel()
    tally = asyncio.run(sample.sample(run, r, some, model, length_score))
    assert tally.finished == tally.total == len(some) * 3 and tally.failed == 0
    assert len(list(run.rows("turns.jsonl"))) == len(some) * 3 * 5
    keys = Counter((row["prompt_id"], row["chain"], row["step"], row["role"]) for row in run.rows("turns.jsonl"))
    assert set(keys.values()) == {1} and len(set(model.seeds)) == len(model.seeds)
    group_of = {p.id: p.group for p in some}.__getitem__
    numbers = summary.chain_numbers(sample.read_chains(run), group_of, tally.total, r.chain)
    for step in numbers["steps"]:
        assert step["proposals"] == step["accepted"] + sum(step["rejected"].values()) == tally.total
    assert_it_adds_up(summary.waterfall(section(numbers)))


def test_turns_that_chains_do_not_ask_for_are_not_waited_for(recipe_file: Path, tmp_path: Path):
    overrides = ("chain.chains_per_prompt=3", "chain.steps=2", "chain.acceptance=improve", "chain.good_enough=0.6")
    run, r, some = setup(recipe_file, tmp_path / "run", *overrides)
    model = ScriptedModel()

    async def one_in_seven_fails(messages: list[dict[str, str]], seed: int) -> Completion:
        if seed % 7 == 0:
            raise RequestFailed("too long")
        return await model(messages, seed)

    first = asyncio.run(sample.sample(run, r, some, one_in_seven_fails, length_score))
    assert first.failed and first.meter.done < first.total * 5 and first.left.count(first.total) == 0
    stored = len(list(run.rows("turns.jsonl")))
    second = asyncio.run(sample.sample(run, r, some, model, length_score))
    assert second.total == first.failed == second.finished and second.reused_turns
    assert second.left.count(second.total) == 0
    assert second.meter.done == len(list(run.rows("turns.jsonl"))) - stored


def test_the_progress_of_a_schedule_is_never_negative_after_a_gap(recipe_file: Path, tmp_path: Path):
    """One chain near the beginning is missing, so that more are finished than the beginning makes one expect."""
    overrides = ["chain.chains_per_prompt=6", "dataset.min_gain=null", "dataset.phrase_limit=null"]
    run, r, some = setup(recipe_file, tmp_path / "run", *overrides)
    asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    rows = run["chains.jsonl"].read_text().splitlines(keepends=True)
    r = recipe_files.load_recipe_file(recipe_file, [*overrides, "dataset.rows=5"])
    lines = []
    for missing in range(0, len(rows), 6):
        run["chains.jsonl"].write_text("".join(rows[:missing] + rows[missing + 1 :]))
        run["turns.jsonl"].unlink(missing_ok=True)
        plan = schedule.Schedule(r, {p.id: p for p in some})
        more = {"schedule": plan, "show": lambda line: lines.append(line())}
        tally = asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score, **more))
        assert tally.ending and tally.left.count(tally.total) >= 0
    assert lines and not [line for line in lines if "/-" in line]


def test_the_turns_left_are_about_right_while_chains_that_end_early_have_ended_and_others_last():
    """400 chains, 100 at once: six in ten end after their first turn, and three in ten of the rest at the third."""
    dice, turns = random.Random(4), {}
    for n in range(400):
        turns[n] = 1 if dice.random() < 0.6 else 3 if dice.random() < 0.3 else 5
    ends, left, made, wrong = dict.fromkeys(range(100), 0), TurnsLeft(5), Counter(), []
    clock = {n: dice.expovariate(1) for n in ends}
    for n in ends:
        left.ask((str(n), 0))
    while clock:
        n = min(clock, key=clock.__getitem__)
        made[n] += 1
        if made[n] < turns[n]:
            left.ask((str(n), 0))
            clock[n] += dice.expovariate(1)
        else:
            left.end((str(n), 0))
            now = clock.pop(n)
            if (begun := len(made.keys() | clock.keys())) < 400:
                left.ask((str(begun), 0))
                clock[begun] = now + dice.expovariate(1)
        wrong.append(left.count(400) / max(1, sum(turns.values()) - made.total()))
    assert made == turns and left.count(400) == 0
    assert all(0.8 < ratio < 1.25 for ratio in wrong[200:600]), wrong[100:700:20]


def section(numbers: dict[str, Any]) -> Sampling:
    """The numbers of chains as metrics.json holds them, beside a cost that is not known."""
    cost = dict.fromkeys(("prompt_tokens", "new_tokens", "seconds", "tokens_per_s"))
    return Sampling.model_validate(numbers | cost | {"reused_turns": 0})


def assert_it_adds_up(fall: list[tuple[str, int]]) -> None:
    """Each total is the one above it less the losses between them; a new kind of text begins a new fall."""
    totals = ["clean first answers", "clean revisions", "accepted revisions", "chains with a clean final state"]
    left = 0
    for what, n in fall:
        if n < 0:
            left += n
        elif what in totals:
            assert (what, n) == (what, left)
            totals.remove(what)
        else:
            left = n
    assert not totals


def test_the_waterfall_tells_every_loss_by_its_reason():
    recorded = Metrics.model_validate(fixture_run.metrics()).sampling
    first, second = recorded.steps
    steps = [
        first.model_copy(update={"proposals": 10, "accepted": 4, "rejected": {"empty": 5, "unscored": 1}}),
        second.model_copy(
            update={"proposals": 10, "accepted": 6, "rejected": {"not accepted by the rule": 3, "empty": 1}}
        ),
    ]
    dirty = {"empty": 2, "repeats itself": 1}
    counts = {"finished": 10, "dirty_answers": 3, "dirty_answers_by_reason": dirty, "usable": 9, "steps": steps}
    fall = summary.waterfall(recorded.model_copy(update=counts))
    assert_it_adds_up(fall)
    assert dict(fall)["clean revisions"] == 14 and dict(fall)["without a clean final state"] == -1
    assert [n for what, n in fall if what == "empty"] == [-2, -6]


def test_same_seed_same_bytes_whatever_the_order_and_the_concurrency(recipe_file: Path, tmp_path: Path):
    a, r, some = setup(recipe_file, tmp_path / "a", "serving.concurrency=1")
    asyncio.run(sample.sample(a, r, some, ScriptedModel(), length_score))
    b, r2, _ = setup(recipe_file, tmp_path / "b", "serving.concurrency=64")
    asyncio.run(sample.sample(b, r2, random.Random(1).sample(some, len(some)), ScriptedModel(0.001), length_score))
    assert sorted_rows(a["chains.jsonl"]) == sorted_rows(b["chains.jsonl"]) and len(
        sorted_rows(a["chains.jsonl"])
    ) == len(some)
    assert sorted_rows(a["turns.jsonl"]) == sorted_rows(b["turns.jsonl"])


def test_at_most_so_many_chains_are_in_flight(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "serving.concurrency=4")
    most = now = 0

    async def model(messages, seed):
        nonlocal most, now
        now += 1
        most = max(most, now)
        try:
            return await ScriptedModel(0.001)(messages, seed)
        finally:
            now -= 1

    asyncio.run(sample.sample(run, r, some, model, length_score))
    assert most == 4


def test_a_request_that_fails_costs_one_chain_with_its_reason_and_is_tried_again_next_time(
    recipe_file: Path, tmp_path: Path
):
    run, r, some = setup(recipe_file, tmp_path / "run")
    good = ScriptedModel()

    async def flaky(messages, seed):
        if some[0].text in messages[0]["content"]:
            raise RequestFailed("the server answered 400: too long")
        return await good(messages, seed)

    tally = asyncio.run(sample.sample(run, r, some, flaky, length_score))
    assert (tally.failed, tally.finished) == (1, len(some) - 1)
    assert [row["reason"] for row in run.rows("failed.jsonl")] == ["the server answered 400: too long"]
    tally = asyncio.run(sample.sample(run, r, some, good, length_score))
    assert (tally.total, tally.finished) == (1, 1) and len(list(run.rows("chains.jsonl"))) == len(some)


def test_refused_prompts_never_keep_a_run_from_its_end(recipe_file: Path, tmp_path: Path):
    """More of them than make a server that refuses everything; alone at last; and as many chains of one prompt."""
    (recipe_file.parent / "films.txt").write_text("\n".join(f"Film number {n}" for n in range(60)))
    run, r, some = setup(recipe_file, tmp_path / "run", "serving.concurrency=4")
    good, bad = ScriptedModel(), {p.text for p in some[: sample.MOST_FAILURES_IN_A_ROW + 5]}

    def picky(refused: bool):
        async def ask(messages, seed):
            if messages[0]["content"] in bad:
                raise RequestFailed("no, 6 times", refused=refused)
            return await good(messages, seed)

        return ask

    for refused in (True, True, False):
        mixed = some[::-1] if not run["chains.jsonl"].exists() else some
        tally = asyncio.run(sample.sample(run, r, mixed, picky(refused), length_score))
        assert tally.failed == len(bad) == len(list(run.rows("failed.jsonl")))
    assert len(list(run.rows("chains.jsonl"))) == len(some) - len(bad)
    run, r, some = setup(recipe_file, tmp_path / "many", "chain.chains_per_prompt=64", "serving.concurrency=64")
    bad = {some[0].text}
    tally = asyncio.run(sample.sample(run, r, some[:3], picky(True), length_score))
    assert (tally.failed, tally.finished) == (64, 128)


def test_what_failed_is_remembered_until_it_is_done(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run")
    good, bad = ScriptedModel(), some[0].text

    async def picky(messages, seed):
        if messages[0]["content"] == bad:
            raise RequestFailed("too long", refused=True)
        return await good(messages, seed)

    async def dead(messages, seed):
        raise ServingError("the server is gone")

    for model in (picky, picky, dead):  # nothing is lost by a session that is broken off, and nothing doubled
        with contextlib.suppress(ServingError):
            asyncio.run(sample.sample(run, r, some, model, length_score))
        assert [row["reason"] for row in run.rows("failed.jsonl")] == ["too long"]
    with run["failed.jsonl"].open("a") as file:
        file.write('{"reason": "of nothing"}\n')
    with pytest.raises(RunError, match="failed.jsonl line 2 is damaged"):
        asyncio.run(sample.sample(run, r, some, good, length_score))
    run["failed.jsonl"].write_text(json.dumps({"prompt_id": some[0].id, "number": 0, "reason": "too long"}) + "\n")
    asyncio.run(sample.sample(run, r, some, good, length_score))
    assert not run["failed.jsonl"].exists() and len(list(run.rows("chains.jsonl"))) == len(some)


def test_a_server_that_begins_to_fail_stops_the_run(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=4", "serving.concurrency=2")
    model = Breaking(20, RequestFailed("answered 500, 6 times"))
    with pytest.raises(ServingError, match="20 requests failed one after the other.*500"):
        asyncio.run(sample.sample(run, r, some, model, length_score))
    assert model.asked <= 20 + sample.MOST_FAILURES_IN_A_ROW + 2


def test_a_turn_is_not_taken_for_an_answer_to_other_words(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run")
    asyncio.run(sample.sample(run, r, some, ScriptedModel(), length_score))
    whole = {row["prompt_id"]: row for row in run.rows("chains.jsonl")}
    # As if the line of its first answer had been damaged and taken out, before its chain was finished.
    lost = some[0].id
    for name in ("turns.jsonl", "chains.jsonl"):
        rows = [row for row in run.rows(name) if row["prompt_id"] != lost or row.get("step", 0)]
        rows = [row for row in rows if name == "turns.jsonl" or row["prompt_id"] != lost]
        run[name].write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Other(ScriptedModel):  # the engine says something else than before
        async def __call__(self, messages, seed):
            done = await super().__call__(messages, seed)
            return done if len(messages) > 1 else replace(done, text=f"Another {done.text}")

    asyncio.run(sample.sample(run, r, some, Other(), length_score))
    (chain,) = (row for row in run.rows("chains.jsonl") if row["prompt_id"] == lost)
    assert chain["answer"] == f"Another {whole[lost]['answer']}"
    assert chain["steps"][0]["critique"] != whole[lost]["steps"][0]["critique"]


def test_a_server_that_refuses_everything_stops_the_run(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=4", "serving.concurrency=2")

    async def broken(messages, seed):
        raise RequestFailed("500")

    with pytest.raises(ServingError, match="20 requests failed one after the other"):
        asyncio.run(sample.sample(run, r, some, broken, length_score))


def test_a_dead_server_stops_the_run_at_once_and_what_is_finished_stays(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "serving.concurrency=2")
    good, dies = ScriptedModel(), Breaking(23, ServingError("vLLM ended by itself"))
    with pytest.raises(ServingError, match="ended by itself"):
        asyncio.run(sample.sample(run, r, some, dies, length_score))
    assert len(list(run.rows("turns.jsonl"))) == 23
    asyncio.run(sample.sample(run, r, some, good, length_score))
    whole, r2, _ = setup(recipe_file, tmp_path / "whole")
    asyncio.run(sample.sample(whole, r2, some, ScriptedModel(), length_score))
    assert sorted_rows(run["chains.jsonl"]) == sorted_rows(whole["chains.jsonl"])


def test_a_scorer_that_fails_ends_the_run_with_its_own_error(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run")

    def broken(texts, prompts):
        raise ZeroDivisionError("in the scorer")

    async def go():
        return await sample.sample(run, r, some, ScriptedModel(), BatchScorer(broken))

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(go(), 20))


def test_generation_does_not_wait_for_the_scorer(recipe_file: Path, tmp_path: Path):
    run, r, some = setup(recipe_file, tmp_path / "run", "serving.concurrency=4")
    model, enough, waited = ScriptedModel(), threading.Event(), []

    async def asked(messages, seed):
        done = await model(messages, seed)
        if len(model.seeds) >= 3 * len(some):  # the whole first step of all chains, four at a time
            enough.set()
        return done

    def scorer(texts, besides):
        waited.append(enough.wait(20))
        return [Score(0.5) for _ in texts]

    async def go():
        return await sample.sample(run, r, some, asked, BatchScorer(scorer))

    assert asyncio.run(go()).finished == len(some) and all(waited)


def test_scores_are_batched_and_come_back_to_their_own_text():
    sizes = []

    def scorer(texts, besides):
        sizes.append(len(texts))
        time.sleep(0.01)
        return [Score(float(t)) for t in texts]

    async def go():
        scoring = BatchScorer(scorer)
        return await asyncio.gather(*(scoring(str(i), None) for i in range(100)))

    assert [s.value for s in asyncio.run(go())] == list(range(100))
    assert sum(sizes) == 100 and len(sizes) < 10


def test_a_scorer_that_works_all_of_the_time_is_the_brake():
    busy = []

    def scorer(texts, besides):
        time.sleep(0.2)
        return [Score(0.0) for _ in texts]

    async def go():
        scoring = BatchScorer(scorer)
        task = asyncio.create_task(scoring("a", None))
        await asyncio.sleep(0.1)
        busy.append(scoring.busy_seconds())  # of the batch at work
        await task
        busy.append(scoring.busy_seconds())

    asyncio.run(go())
    assert 0.05 < busy[0] < busy[1] and 0.2 <= busy[1] < 1
    for worked, seconds, is_brake in ((29.0, 30.0, True), (20.0, 30.0, False), (9.0, 9.5, False)):
        progress = SamplingProgress(4, 3, lambda worked=worked: worked)
        progress.started -= seconds
        assert progress.waits_for_scores is is_brake
        assert ("the scorer is the brake" in progress.line()) is is_brake


WORKER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import fixture_run
from tests.conftest import ScriptedModel, length_score
from tests.sampling.test_sample import setup
from dsc_hub.sampling import sample
run, r, some = setup(Path(sys.argv[1]), Path(sys.argv[2]), "chain.chains_per_prompt=6", "serving.concurrency=8")
asyncio.run(sample.sample(run, r, some, ScriptedModel(0.004), length_score))
"""


def kill_and_resume(recipe_file: Path, folder: Path, moments: list[int]) -> None:
    """Start the worker, SIGKILL it when so many turns are on disk, again and again; then let it finish."""
    command = [sys.executable, "-c", WORKER.format(root=str(ROOT)), str(recipe_file), str(folder)]
    for turns in [*moments, None]:
        worker = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if turns is None:
            assert worker.wait(120) == 0
            return
        path = folder / "turns.jsonl"
        deadline = time.monotonic() + 60
        while (
            worker.poll() is None
            and time.monotonic() < deadline
            and (not path.is_file() or path.read_bytes().count(b"\n") < turns)
        ):
            time.sleep(0.001)
        before = path.read_bytes()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])


@pytest.mark.parametrize("moments", [5, pytest.param(50, marks=pytest.mark.long)])
def test_killed_again_and_again_a_run_ends_with_the_same_bytes_as_one_never_killed(
    recipe_file: Path, tmp_path: Path, moments: int
):
    whole, r, some = setup(recipe_file, tmp_path / "whole", "chain.chains_per_prompt=6")
    asyncio.run(sample.sample(whole, r, some, ScriptedModel(), length_score))
    total = len(some) * 6 * 5
    dice = random.Random(moments)
    kill_and_resume(recipe_file, tmp_path / "killed", sorted(dice.sample(range(1, total - 40), moments)))
    for name in ("chains.jsonl", "turns.jsonl"):
        assert sorted_rows(tmp_path / "killed" / name) == sorted_rows(whole[name])
    assert len({json.dumps(json.loads(row)) for row in sorted_rows(tmp_path / "killed" / "turns.jsonl")}) == total


def test_a_veto_and_the_drawn_principle_reach_every_chain_and_the_losses_add_up(recipe_file: Path, tmp_path: Path):
    overrides = ("chain.principles=[one thing, another]", "chain.critique=Mind {principle}.", "chain.steps=2")
    run, r, some = setup(recipe_file, tmp_path / "run", *overrides)
    asked: list[str] = []
    model = ScriptedModel()

    async def listening(messages, seed):
        asked.append(messages[-1]["content"])
        return await model(messages, seed)

    async def veto(revision: str, first: str) -> str:
        return LOST_MEANING if length_of(revision) % 2 else ""

    def length_of(text: str) -> int:
        return int(hashlib.sha256(text.encode()).hexdigest()[0], 16)

    asyncio.run(sample.sample(run, r, some, listening, length_score, veto=veto))
    drawn = Counter(text for text in asked if text.startswith("Mind"))
    assert set(drawn) == {"Mind one thing.", "Mind another."} and sum(drawn.values()) == 2 * len(some)
    chains = sample.read_chains(run)
    steps = [s for c in chains for s in c.steps]
    blocked = [s for s in steps if s.rejected == LOST_MEANING]
    assert blocked and all(length_of(s.revision) % 2 for s in blocked)
    assert not any(s.accepted for s in steps if length_of(s.revision) % 2)
    groups = {p.id: p.group for p in some}
    fall = summary.waterfall(section(summary.chain_numbers(chains, groups.__getitem__, len(chains), r.chain)))
    assert (LOST_MEANING, -len(blocked)) in fall
    assert_it_adds_up(fall)
