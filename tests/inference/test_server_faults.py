"""Chains against servers that misbehave, over HTTP: nothing is lost, little time is, and the cause is reported."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config.recipe import Recipe
from dsc_hub.config.serving import GenerationConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import retries
from dsc_hub.inference.client import Generator
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.records import Prompt, prompt_id
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample
from tests.benchmarks.faults import INSTRUCTIONS, RECIPE
from tests.conftest import length_score
from tests.faulty_server import Fault, FaultyServer, serving

CHAINS = 40
GOOD = Fault(pause_s=0.05)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT_S", 0.02)
    monkeypatch.setattr(retries, "LONGEST_S", 0.2)


@dataclass
class Sampled:
    finished: int
    failed: int
    generator: Generator
    servers: list[FaultyServer]
    turns: int
    reasons: list[str]
    seconds: float

    @property
    def tokens(self) -> int:
        return self.generator.new_tokens


def sampled(folder: Path, *faults: Fault, chains: int = CHAINS, **settings: Any) -> Sampled:
    """Sample so many chains of five requests at one server for each fault."""
    texts = [f"Tell about film number {i}. {INSTRUCTIONS}" for i in range(chains)]
    prompts = [Prompt(prompt_id(t), t, t, "train") for t in texts]
    folder.mkdir(exist_ok=True)
    run, recipe = Run(folder), Recipe.model_validate(RECIPE)
    with ExitStack() as stack:
        endpoints, servers = zip(*(stack.enter_context(serving(f, chains)) for f in faults), strict=True)
        generator = Generator(endpoints, GenerationConfig(), 20, **{"concurrency": 16} | settings)

        async def go() -> Any:
            async with asyncio.timeout(120), generator:
                return await sample.sample(
                    run, recipe, prompts, generator.complete, length_score, level=generator.level
                )

        started = time.monotonic()
        done = asyncio.run(go())
        seconds = time.monotonic() - started
    reasons = [row["reason"] for row in run.rows("failed.jsonl")]
    turns = sum(1 for _ in run.rows("turns.jsonl"))
    return Sampled(done.finished, done.failed, generator, list(servers), turns, reasons, seconds)


@pytest.mark.parametrize("how", ["infinite", "nested", "negative", "huge", "null", "no usage", "text list"])
def test_a_reply_that_is_not_valid_is_requested_again(tmp_path: Path, how: str):
    out = sampled(tmp_path, Fault(how, 0.1, pause_s=0.02))
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.generator.retries == {"garbage": out.servers[0].counts[how]} and out.servers[0].counts[how] > 5
    assert 0 < out.tokens < CHAINS * 5 * 100


@pytest.mark.parametrize("how", ["null", "negative"])
def test_a_server_without_valid_replies_stops_the_run(tmp_path: Path, how: str):
    with pytest.raises(ServingError, match="20 requests failed one after the other; the last: .*without text or usage"):
        sampled(tmp_path, Fault(how, 1, pause_s=0.01))
    assert not (tmp_path / "chains.jsonl").exists()


def test_a_server_that_refuses_what_another_accepts_is_set_aside_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = sampled(tmp_path, Fault("400", 1), GOOD)
    assert (out.finished, out.failed) == (CHAINS, 0)
    refused = out.servers[0].counts["400"]
    assert 0 < refused <= CHAINS and out.generator.retries == {"refused": refused}
    said = capfd.readouterr().err
    assert "answered 400: scripted 400; other servers accepted 3 such requests" in said
    assert "it is not asked any more" in said


def test_a_server_that_refuses_some_of_what_another_accepts_stays(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = sampled(tmp_path, Fault("413", 0.3, pause_s=0.05), GOOD)
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.servers[0].counts["answered"] > 50 and "not asked any more" not in capfd.readouterr().err


def test_what_all_servers_refuse_fails_after_one_try_at_each(tmp_path: Path):
    out = sampled(tmp_path, Fault("400", last=0.9, pause_s=0.02), Fault("400", last=0.9, pause_s=0.02))
    assert (out.finished, out.failed) == (36, 4)
    assert [server.counts["400"] for server in out.servers] == [4, 4]


@pytest.mark.parametrize(
    "fault",
    [Fault("429", 1), Fault("503", 1, "1"), Fault("500", 1), Fault("closes", 1, pause_s=0.05)],
    ids=lambda fault: fault.how,
)
def test_where_one_of_two_servers_is_bad_the_other_does_the_work(tmp_path: Path, fault: Fault):
    alone = sampled(tmp_path / "alone", GOOD)
    out = sampled(tmp_path / "both", fault, GOOD)
    assert (out.finished, out.failed, out.turns) == (CHAINS, 0, CHAINS * 5)
    assert out.servers[0].counts[fault.how] < 80  # of the 200 requests
    assert out.seconds < 1.5 * alone.seconds + 0.5


def test_the_only_server_that_refuses_everything_stops_the_run(tmp_path: Path):
    with pytest.raises(ServingError, match="answered 429: scripted 429; it has not answered for .* s\n.*run the same"):
        sampled(tmp_path, Fault("429", 1))
    assert not (tmp_path / "failed.jsonl").exists()


def test_a_server_that_was_full_for_a_while_is_used_again(tmp_path: Path):
    out = sampled(tmp_path, Fault("429", 1, until_s=1.0, pause_s=0.02), Fault(pause_s=0.3), concurrency=(16, 2))
    assert (out.finished, out.failed) == (CHAINS, 0) and out.servers[0].counts["answered"] > 100


@pytest.mark.parametrize(
    "fault",
    [Fault("429", 0.05), Fault("503", 0.05, "0.1"), Fault("429", 0.2, "0.2"), Fault("429", 0.5)],
    ids=lambda fault: f"{fault.how} {fault.share} {fault.retry_after}",
)
def test_refusals_that_have_nothing_to_do_with_the_load_do_not_slow_the_others(tmp_path: Path, fault: Fault):
    out = sampled(tmp_path, Fault(fault.how, fault.share, fault.retry_after, pause_s=0.05), concurrency=32)
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.generator.retries == {fault.how: out.servers[0].counts[fault.how]}
    if fault.share <= 0.2:
        assert out.servers[0].highest >= 24


@pytest.mark.parametrize("retry_after", ["", "0.1"])
def test_the_limit_of_a_server_with_little_room_becomes_what_it_carries(
    tmp_path: Path, retry_after: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "WAIT_S", 0.05)
    out = sampled(tmp_path, Fault("429", 0, retry_after, room=4, pause_s=0.05), concurrency=32)
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.servers[0].counts["429"] < 250 and out.seconds < 3 * CHAINS * 5 * 0.05 / 4


def test_a_chain_that_waits_holds_no_place(tmp_path: Path):
    """Half of the first requests wait a second; those of the other chains go on at the only two places."""
    out = sampled(tmp_path, Fault("429", 0, "1", first=0.5, pause_s=0.01), concurrency=2)
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.seconds < 6  # one after the other they would wait ten seconds


@pytest.mark.parametrize("how", ["400", "500", "429"])
def test_requests_that_fail_for_their_own_sake_at_the_end_do_not_stop_the_run(tmp_path: Path, how: str):
    out = sampled(tmp_path, Fault(how, last=0.6, pause_s=0.02), chains=60)
    assert (out.finished, out.failed) == (36, 24) and len(out.reasons) == 24
    assert all(f"answered {how}" in reason for reason in out.reasons)


def test_a_server_that_fails_all_after_it_has_worked_stops_the_run(tmp_path: Path):
    with pytest.raises(ServingError, match="20 requests failed one after the other"):
        sampled(tmp_path, Fault("500", 1, from_s=0.5, pause_s=0.02), chains=100)
    assert sum(1 for _ in (tmp_path / "failed.jsonl").open()) <= 36  # those in flight included


def test_a_quota_that_is_declared_is_kept(tmp_path: Path):
    out = sampled(tmp_path, Fault("429", quota=(60, 0.8), declared=True, pause_s=0.02), concurrency=32)
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.servers[0].counts["429"] < 20  # without: 140


def test_a_quota_without_headers_costs_no_chain(tmp_path: Path):
    out = sampled(tmp_path, Fault("429", 0, "0.8", quota=(60, 0.8), pause_s=0.02), concurrency=8)
    assert (out.finished, out.failed) == (CHAINS, 0) and out.servers[0].counts["429"] < 120


def test_a_server_that_cuts_prompts_is_an_error(tmp_path: Path):
    with pytest.raises(ServingError, match="cuts prompts: it counts 256 prompt tokens where.*\n.*--ctx-size") as e:
        sampled(tmp_path, Fault("truncates", 1, pause_s=0.01))
    assert not isinstance(e.value, RequestFailed) and not (tmp_path / "chains.jsonl").exists()


def test_a_server_that_cuts_later_turns_is_an_error(tmp_path: Path):
    """The first request fits; the count of those that go on from it does not grow."""
    with pytest.raises(ServingError, match="cuts prompts: it counts 710 prompt tokens"):
        sampled(tmp_path, Fault("truncates", 1, context=710, pause_s=0.01))
    assert not (tmp_path / "chains.jsonl").exists()


def test_a_server_that_does_not_count_cached_tokens_is_none_that_cuts(tmp_path: Path):
    out = sampled(tmp_path, Fault("caches", 1, pause_s=0.01))
    assert (out.finished, out.failed) == (CHAINS, 0)
    assert out.servers[0].counts["caches"] <= CHAINS * 5 + 3  # it was checked once


def test_what_one_of_two_servers_cuts_the_other_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = sampled(tmp_path, Fault("truncates", 1, pause_s=0.01), GOOD)
    assert (out.finished, out.failed) == (CHAINS, 0) and "cuts prompts" in capfd.readouterr().err
    assert out.servers[1].counts["answered"] == CHAINS * 5
