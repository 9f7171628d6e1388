"""Which server takes a request, and what becomes of the requests when one refuses, errs or says nothing: over HTTP."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dsc_hub.config import recipe_files
from dsc_hub.config.arms import ARMS
from dsc_hub.config.serving import GenerationConfig, ServingConfig
from dsc_hub.errors import ServingError
from dsc_hub.evaluation import arms
from dsc_hub.inference import external, retries, server_pool
from dsc_hub.inference import servers as inference_servers
from dsc_hub.inference.client import Generator
from dsc_hub.inference.retries import RequestFailed
from dsc_hub.inference.servers import Endpoint
from dsc_hub.records import Prompt
from dsc_hub.runs.run import Run
from dsc_hub.sampling import sample
from tests.conftest import ScriptedModel, end_of, interrupt_once, length_score
from tests.sampling.test_sample import setup
from tests.scripted_server import answer_to


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "WAIT_S", 0.01)
    monkeypatch.setattr(retries, "LONGEST_S", 1.0)


@pytest.fixture
def at(start: Callable[..., Any]) -> Callable[..., Endpoint]:
    """Start a server; where it is asked."""
    return lambda **keys: end_of(start(**keys))


def ask(
    ends: list[Endpoint],
    n: int,
    critic: Endpoint | None = None,
    *,
    at_once: int = 10_000,
    timeout_s: float = 20,
    **keys: Any,
) -> tuple[Generator, list[Any], float]:
    """So many different requests, `at_once`; the generator, answers or errors, seconds."""

    async def go() -> Any:
        places = asyncio.Semaphore(at_once)
        async with Generator(ends, GenerationConfig(), timeout_s, critic, **keys) as g:

            async def one(i: int) -> Any:
                async with places:
                    return await (g.criticise if critic else g.complete)(
                        [{"role": "user", "content": f"question {i}"}], i
                    )

            started = time.monotonic()
            found = await asyncio.gather(*map(one, range(n)), return_exceptions=True)
            return g, found, time.monotonic() - started

    return asyncio.run(asyncio.wait_for(go(), 60))


def failures(found: list[Any]) -> list[str]:
    return [str(e) for e in found if isinstance(e, BaseException)]


class Narrow:
    """A server that does `room` requests at once and refuses what is more."""

    def __init__(self, room: int, status: str = "429") -> None:
        self.room, self.status, self.now, self.refused = room, status, 0, 0
        self._lock = threading.Lock()

    def fault(self, body: dict, before: int) -> str:
        with self._lock:
            if self.now >= self.room:
                self.refused += 1
                return self.status
            self.now += 1
            return ""

    def answer(self, body: dict) -> str:
        with self._lock:
            self.now -= 1
        return answer_to(body)


@pytest.mark.parametrize("status", ["429", "503"])
def test_what_a_full_server_refuses_waits_its_turn(at: Callable[..., Endpoint], status: str):
    narrow = Narrow(8, status)
    end = at(pause=0.1, fault=narrow.fault, answer=narrow.answer)
    g, found, _ = ask([end], 120, concurrency=64)
    assert not failures(found) and narrow.refused
    assert narrow.refused < 300  # not each of them again and again


def test_a_short_burst_of_refusals_is_not_for_good(at: Callable[..., Endpoint]):
    began: list[float] = []

    def fault(body: dict, before: int) -> str:
        began.append(time.monotonic())
        return "503" if time.monotonic() < began[0] + 0.2 else ""

    g, found, _ = ask([at(fault=fault)], 3000, concurrency=64)
    assert not failures(found) and g.retries["503"] and g.level() > 32


def test_a_critic_that_refuses_is_asked_for_less_and_its_requests_count(at: Callable[..., Endpoint]):
    narrow = Narrow(8)
    critic = at(pause=0.05, fault=narrow.fault, answer=narrow.answer)
    g, found, _ = ask([at()], 120, critic)
    assert not failures(found) and narrow.refused < 400
    assert g.level() < 2 * 128 and ask([at()], 1, at())[0].level() == 2 * 128


@pytest.mark.parametrize("how", ["500", "502", "404", "garbage", "closes"])
def test_what_one_server_cannot_do_another_does(at: Callable[..., Endpoint], how: str):
    bad, good = at(fault=lambda body, before: how), at()
    _, found, _ = ask([bad, good], 40)
    assert not failures(found)


@pytest.mark.parametrize(
    "why", [ServingError("endpoint answered 502 Bad Gateway to /models"), OSError(2, "No such file", "vllm.log")]
)
def test_a_server_whose_proxy_answers_for_it_is_gone(at: Callable[..., Endpoint], why: Exception):
    bad, good = at(fault=lambda body, before: "502"), at()

    def check() -> None:
        raise why

    g, found, _ = ask([replace(bad, check=check), good], 40)
    assert not failures(found) and g.retries["server gone"] and not g.retries["502"]


def test_a_wrong_key_at_one_of_two_leaves_the_work_to_the_other(at: Callable[..., Endpoint]):
    bad, good = at(fault=lambda body, before: "401"), at()
    g, found, _ = ask([bad, good], 40)
    assert not failures(found) and g.level() == 128
    with pytest.raises(ServingError, match="answered 401") as e:
        raise next(error for error in ask([bad], 3)[1] if isinstance(error, BaseException))
    assert not isinstance(e.value, RequestFailed)


def test_a_request_that_is_forbidden_costs_itself(at: Callable[..., Endpoint]):
    end = at(fault=lambda body, before: "403" if "7" in body["messages"][0]["content"] else "")
    _, found, _ = ask([end], 10)
    (error,) = (e for e in found if isinstance(e, BaseException))
    assert isinstance(error, RequestFailed) and error.refused and "answered 403" in str(error)


def test_prompts_are_spread_over_three_servers_of_one_machine():
    for ports in ((8001, 8002, 8003), (40_123, 40_124, 51_777)):
        ends = [Endpoint(f"http://127.0.0.1:{port}/v1", "m", "k") for port in ports]

        async def go(ends: list[Endpoint] = ends) -> list[int]:
            servers = server_pool.ServerPool(ends, 3000, Counter())
            for i in range(3000):
                await servers.acquire(f"Write a review of the {i}. film.")
            servers.close()
            return [server.busy for server in servers.all]

        assert min(asyncio.run(go())) > 900


def test_one_request_that_is_always_refused_fails_while_the_others_go_on_as_before(
    at: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "LONGEST_S", 0.1)
    refused: list[float] = []

    def fault(body: dict, before: int) -> str:
        if body["messages"][0]["content"] != "question 7":
            return ""
        refused.append(time.monotonic())
        return "429"

    end = at(fault=fault, pause=0.05)
    g, found, _ = ask([end], 2000, concurrency=20, at_once=20)
    assert len(failures(found)) == 1 and "11 times" in failures(found)[0] and g.level() > 10
    assert refused[-1] < time.monotonic() - 0.5  # not when all the others were done


def test_a_request_that_is_refused_while_others_are_answered_waits_for_longer(
    at: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retries, "LONGEST_S", 0.1)

    def fault(body: dict, before: int) -> str:
        return "429" if body["messages"][0]["content"] == "question 7" and before < 18 else ""

    assert not failures(ask([at(fault=fault, pause=0.05)], 1500, concurrency=20, at_once=20)[1])


def test_a_burst_that_one_server_refuses_does_not_leave_it_idle(at: Callable[..., Any]):
    busy, slow = at(fault=lambda body, before: "" if before else "429"), at(pause=0.3)
    _, found, seconds = ask([busy, slow], 40, concurrency=(64, 1))
    assert not failures(found) and seconds < 3


def test_who_waits_for_a_place_gets_the_next_one_in_order_and_avoids_nobody_in_vain():
    ends = [Endpoint(f"http://127.0.0.1:{port}/v1", "m", "k") for port in (1, 2)]

    async def go() -> None:
        servers = server_pool.ServerPool(ends, 1, Counter())
        a, b = servers.all
        taken = [await servers.acquire("x"), await servers.acquire("x")]
        assert {a, b} == set(taken)
        order: list[str] = []

        async def wait(name: str, *avoid: server_pool.PooledServer) -> None:
            server = await servers.acquire("x", avoid)
            order.append(f"{name}{servers.all.index(server)}")

        tasks = [asyncio.create_task(wait(n, *avoid)) for n, *avoid in (("p", a), ("q",), ("r",))]
        await asyncio.sleep(0)
        servers.release(a)  # the first in the row avoids it: the second takes it at once
        await asyncio.sleep(0)
        assert order == ["q0"]
        tasks[2].cancel()
        await asyncio.sleep(0)
        servers.release(b)
        servers.release(a)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["q0", "p1"] and (a.busy, b.busy) == (0, 1)
        a.busy = 1
        late = asyncio.create_task(servers.acquire("x", [b]))
        await asyncio.sleep(0)
        servers.release(a)
        late.cancel()  # it has its place, and will not take it
        await asyncio.gather(late, return_exceptions=True)
        assert a.busy == 0
        servers.close()

    asyncio.run(go())


def test_a_request_that_kills_its_server_fails_alone(at: Callable[..., Any]):
    """Whatever is in flight with it dies with it; suspected ones are asked alone, and only it fails."""
    down = threading.Event()

    def fault(body: dict, before: int) -> str:
        if body["messages"][0]["content"] == "question 5":
            down.set()
        return "closes" if down.is_set() else ""

    def check() -> None:
        if down.is_set():
            raise ServingError("vLLM ended by itself")

    end = replace(at(fault=fault, pause=0.05), check=check, restart=down.clear, is_ready=lambda: True)
    _, found, _ = ask([end], 20)
    assert len(failures(found)) == 1 and "4 servers were gone" in failures(found)[0]
    assert isinstance(found[5], RequestFailed)


def test_a_silent_server_is_looked_at_once_and_holds_up_nobody_else(at: Callable[..., Endpoint]):
    looks: list[float] = []

    def check() -> None:
        looks.append(time.monotonic())
        time.sleep(1.0)
        raise ServingError("says nothing")

    silent = replace(at(fault=lambda body, before: "hangs"), check=check)
    g, found, seconds = ask([silent, at()], 60, timeout_s=1.5)
    assert not failures(found) and g.retries["server gone"] > 10
    assert len([when for when in looks if when < looks[0] + 0.9]) == 1 and seconds < 8


def test_timeouts_are_counted_apart_from_other_failures(at: Callable[..., Endpoint]):
    end = at(fault=lambda body, before: {0: "closes", 1: "closes", 2: "hangs", 3: "hangs"}.get(before, ""))
    g, found, _ = ask([end], 1, timeout_s=1.0)
    assert not failures(found) and g.retries == Counter({"connection lost": 2, "no answer in time": 2})


def test_a_full_disk_while_a_server_is_brought_back_is_told(
    at: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
):
    def full(text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_pool, "say", full)

    def gone() -> None:
        raise ServingError("gone")

    end = replace(at(fault=lambda body, before: "closes"), check=gone)
    _, found, _ = ask([end], 5)
    assert len(failures(found)) == 5 and all("No space left" in told for told in failures(found))


def test_a_server_that_dies_while_it_is_looked_at_is_gone_and_no_bug(monkeypatch: pytest.MonkeyPatch):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"data": [')

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with pytest.raises(ServingError, match="can't be used"):
        external.external(ServingConfig(endpoints=(url,)))
    assert inference_servers.prefix_cache([Endpoint(url, "m", "k")]) == [None]
    server.shutdown()


def test_proxies_are_those_of_the_environment_and_no_password_file_is_read(
    at: Callable[..., Endpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert server_pool._proxy_of("http://outside.example/v1") == "http://proxy:3128"
    assert (
        server_pool._proxy_of("http://inside.example/v1") is None
        and server_pool._proxy_of("https://outside.example/v1") is None
    )
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "netrc").write_text("default login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not failures(ask([at()], 3)[1])


def test_ctrl_c_in_a_chain_of_the_evaluation_ends_it(recipe_file: Path, tmp_path: Path):
    r = recipe_files.load_recipe_file(
        recipe_file,
        [f"evaluation.arms=[{', '.join(a for a in ARMS if not a.startswith('teacher'))}]", "serving.concurrency=2"],
    )
    held_out = [Prompt(f"p{i}", f"Tell of film {i}.", f"film {i}", "test") for i in range(8)]
    good, asked = ScriptedModel(), Counter[str | None]()

    async def complete(messages: list[dict[str, str]], seed: int, model: str | None) -> Any:
        asked[model] += 1
        if len(messages) > 3 and asked[None] > 12:
            signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0.01)
        return await good(messages, seed)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(arms.answer_prompts(Run(tmp_path), r, held_out, complete, length_score))
    assert asked[None] < 8 * 5 and not asked["distilled"]
    assert arms.seconds(Run(tmp_path), "self_critique") is None


def test_after_ctrl_c_what_waits_for_a_place_is_not_sent(recipe_file: Path, tmp_path: Path, start: Callable[..., Any]):
    bodies: list[dict] = []
    server = start(pause=0.4, bodies=bodies)
    run, r, some = setup(recipe_file, tmp_path / "run", "chain.chains_per_prompt=4")

    async def go() -> Any:
        async with Generator([end_of(server)], GenerationConfig(), 20, concurrency=2) as g:
            return await sample.sample(run, r, some, g.complete, length_score, level=lambda: 50)

    interrupt_once(lambda: len(bodies) >= 2)
    assert asyncio.run(go()).interrupted and 2 <= len(bodies) <= 4
    assert len(list(run.rows("turns.jsonl"))) == len(bodies)
