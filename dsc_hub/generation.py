"""Text from OpenAI-compatible servers: which one is asked, seeds, retries, and errors told apart. Knows nothing of chains.

A request that fails for its own sake (too long, answer garbled again and again) raises `RequestFailed` and costs one chain. A
server that is gone is waited for, or started again, while its requests go to the others; `ServingError` stops the run when
none comes back, with all that is finished on disk.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeVar

import aiohttp  # a client of the servers' makers takes ten times as long for a request (3 ms), and longer with more in flight

from dsc_hub.errors import ServingError
from dsc_hub.level import Level
from dsc_hub.progress import say
from dsc_hub.recipe import Generation
from dsc_hub.serving import Endpoint

RETRIES = 5  # of a request, on 408, 409, 429, 5xx, a lost connection or an answer that can't be used
TIMEOUTS = 2  # retries after no answer at all: each has waited for long
WAIT_S, LONGEST_S = 0.5, 30.0  # before the first retry, doubled each time up to the longest; with jitter
REVIVALS = 4  # tries to bring back a server that is gone
DEATHS = 3  # servers that may be gone while they have a request; then it is the request
TOO_MUCH = {"429", "503"}
NOT_OFFERED = {400, 403, 404, 405, 422, 501}  # what servers say to a route or a parameter that they don't have

Message = dict[str, str]
Concurrency = int | Literal["auto"]
T = TypeVar("T")


class RequestFailed(ServingError):
    """One request can't be done; others may."""


class _Again(Exception):
    """A request that may be done on another try. `wait_s`: what the server asks to wait for."""

    def __init__(self, reason: str, told: str, wait_s: float | None = None, most: int | None = None) -> None:
        super().__init__(told)
        self.reason, self.wait_s, self.most = reason, wait_s, RETRIES if most is None else most


class _Gone(Exception):
    """The server is gone with the request."""


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int


@dataclass(eq=False)
class _Lane:
    """A server and what it has to do."""

    endpoint: Endpoint
    level: Level
    busy: int = 0
    revival: asyncio.Task[None] | None = None
    gone: ServingError | None = None  # for good

    @property
    def is_up(self) -> bool:
        return self.revival is None and self.gone is None


@dataclass
class Generator:
    """Asks one or more servers: the one that has a chain's beginning in its cache, unless it has enough to do. Use as an async
    context manager. Sampling settings are stated in every request: servers have defaults of their own.

    How many requests are in flight is bounded by the stage that asks, which goes by `level`: `concurrency` at each server, or what a
    tuple says for each. `retries` counts the requests that
    were sent again, by reason, and servers that came back; `new_tokens` what was written.
    """

    endpoints: Sequence[Endpoint]
    settings: Generation
    timeout_s: float
    critic: Endpoint | None = None
    concurrency: Concurrency | tuple[Concurrency, ...] = "auto"
    retries: Counter[str] = field(default_factory=Counter)
    new_tokens: int = 0
    _lanes: list[_Lane] = field(default_factory=list, init=False)
    _critic: list[_Lane] = field(default_factory=list, init=False)

    async def __aenter__(self) -> Generator:
        self._changed = asyncio.Condition()
        # How many connections there are is bounded by the level. Servers of vLLM's kind close idle ones after five seconds.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            trust_env=True,
        )
        each = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * len(self.endpoints)
        self._lanes = [_Lane(e, Level(wanted)) for e, wanted in zip(self.endpoints, each, strict=True)]
        self._critic = [_Lane(self.critic, Level("auto"))] if self.critic else []
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in (*self._lanes, *self._critic):
            if lane.revival:
                lane.revival.cancel()
        await self._http.close()

    def level(self) -> int:
        """How many requests all servers together should have now."""
        return sum(lane.level.now for lane in self._lanes if lane.is_up) or 1

    async def complete(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """One chat completion. `model` overrides the endpoint's own name (an adapter beside its base)."""
        return await self._persist(self._lanes, messages, seed, model)

    async def criticise(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """A critique: by the critic if there is one, else as any completion."""
        if not self._critic:
            return await self.complete(messages, seed, model)
        return await self._persist(self._critic, messages, seed, None)

    async def surprise(self, text: str, model: str | None = None) -> float | None:
        """Mean surprise of the model at a text, in nats a token (the logarithm of its perplexity): asked of vLLM as the
        log-probabilities of a prompt, without a chat template and without the first token, which follows nothing.

        None where the server gives no such thing, which is not zero. Errors as in `complete`.
        """

        async def ask(lane: _Lane) -> float | None:
            asked = {
                "model": model or lane.endpoint.model,
                "prompt": text,
                "max_tokens": 1,
                "temperature": 0.0,
                "seed": 0,
            }
            answer = await self._post(lane.endpoint, "completions", asked | {"prompt_logprobs": 0}, NOT_OFFERED)
            found = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
            nats = [-next(iter(token.values()))["logprob"] for token in found or () if token]
            return sum(nats) / len(nats) if nats else None

        return await self._until_done(self._lanes, text, ask)

    async def _persist(
        self, lanes: Sequence[_Lane], messages: list[Message], seed: int, model: str | None
    ) -> Completion:
        beginning = "".join(m["content"] for m in messages[:2] if m["role"] != "assistant")

        async def ask(lane: _Lane) -> Completion:
            return await self._completion(lane, messages, seed, model)

        return await self._until_done(lanes, beginning, ask)

    async def _until_done(self, lanes: Sequence[_Lane], beginning: str, ask: Callable[[_Lane], Awaitable[T]]) -> T:
        """Ask until there is an answer: again after a while, or elsewhere."""
        tries = deaths = 0
        while True:
            lane = await self._free(lanes, beginning)
            lane.busy += 1
            try:
                return await ask(lane)
            except _Again as e:
                tries += 1
                if tries > e.most:
                    raise RequestFailed(f"{e}, {tries} times") from None
                self.retries[e.reason] += 1
                if e.reason in TOO_MUCH:
                    lane.level.too_much()
                wait_s = e.wait_s or min(LONGEST_S, WAIT_S * 2 ** (tries - 1)) * random.uniform(0.75, 1.25)
            except _Gone as e:
                self.retries["server gone"] += 1
                if lane.is_up:
                    lane.revival = asyncio.create_task(self._revive(lane, str(e)))
                deaths, wait_s = deaths + 1, 0.0
                if deaths > DEATHS:
                    raise RequestFailed(
                        f"{deaths} servers were gone while they had this request; the last: {e}"
                    ) from None
            finally:
                lane.busy -= 1
            await asyncio.sleep(wait_s)

    async def _free(self, lanes: Sequence[_Lane], beginning: str) -> _Lane:
        """The server to ask now. Waits while none is up; ServingError if none will be."""
        while not (up := [lane for lane in lanes if lane.is_up]):
            if all(lane.gone for lane in lanes):
                raise lanes[-1].gone or AssertionError
            async with self._changed:
                await self._changed.wait()
        if len(up) == 1:
            return up[0]
        # The same beginning prefers the same server (rendezvous hashing): nothing needs to be remembered of any chain.
        crc = zlib.crc32(beginning.encode("utf-8", "surrogatepass"))
        first = max(up, key=lambda lane: zlib.crc32(lane.endpoint.url.encode(), crc))
        return first if first.busy < first.level.now else min(up, key=lambda lane: lane.busy / lane.level.now)

    async def _revive(self, lane: _Lane, why: str) -> None:
        """Wait for a server that is gone, or start it again; told by `_changed` when it is up or given up."""
        others = sum(other.is_up for other in self._lanes if other is not lane)
        say(f"{why}\n  {'its requests go to the others; ' if others else ''}trying to bring it back")
        try:
            for n in range(REVIVALS):
                await asyncio.sleep(min(LONGEST_S, 2 * WAIT_S * 4**n) * random.uniform(0.75, 1.25))
                try:
                    await self._bring_back(lane.endpoint)
                except (ServingError, OSError) as e:
                    why = e.message if isinstance(e, ServingError) else str(e)
                else:
                    say(f"{lane.endpoint.url} is back")
                    self.retries["server back"] += 1
                    return
            lane.gone = ServingError(
                f"{lane.endpoint.url} did not come back in {REVIVALS} tries: {why}",
                "What is finished is kept; run the same command again when it can be reached.",
            )
        finally:
            lane.revival = None
            async with self._changed:
                self._changed.notify_all()

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Start a server of our own again, or look whether another's is there. ServingError if it is not."""
        if endpoint.restart is None:
            await asyncio.to_thread(endpoint.check)
            return
        await asyncio.to_thread(endpoint.restart)
        while not await asyncio.to_thread(endpoint.is_ready):
            await asyncio.sleep(0.25)

    async def _completion(self, lane: _Lane, messages: list[Message], seed: int, model: str | None) -> Completion:
        s = self.settings
        asked = {"model": model or lane.endpoint.model, "messages": messages, "seed": seed, "n": 1}
        asked |= {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_new_tokens}
        answer = await self._post(lane.endpoint, "chat/completions", asked | s.extra)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            text, why = choice["message"]["content"] or "", choice["finish_reason"] or ""
            # Half a surrogate pair, which JSON can hold, is no text that could be written anywhere.
            text = text.encode("utf-8", "replace").decode()
            done = Completion(text, str(why), int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        except (AttributeError, LookupError, TypeError, ValueError):
            raise _Again("garbage", f"{lane.endpoint.url} sent an answer without text or usage") from None
        self.new_tokens += done.new_tokens
        lane.level.done(done.new_tokens, lane.busy, time.monotonic())
        return done

    async def _post(
        self, endpoint: Endpoint, route: str, body: Mapping[str, Any], not_offered: Collection[int] = ()
    ) -> dict[str, Any]:
        """One request, one answer; {} where the status says that the server has no such thing (`not_offered`). Else what went wrong
        is `_Again`, `_Gone`, RequestFailed for the request's own sake, or ServingError where no request will be answered."""
        url = endpoint.url
        try:
            headers = {"Authorization": f"Bearer {endpoint.api_key}"}
            post = self._http.post(f"{url}/{route}", json=body, headers=headers, allow_redirects=False)
            async with post as answer:
                status, data, asked_wait = answer.status, await answer.read(), answer.headers.get("Retry-After", "")
        except TimeoutError:
            await self._is_there(endpoint)
            raise _Again("no answer in time", f"{url} gave no answer in {self.timeout_s:g} s", most=TIMEOUTS) from None
        except (aiohttp.ClientError, OSError) as e:
            await self._is_there(endpoint)
            how = "can't be reached" if isinstance(e, aiohttp.ClientConnectorError) else "broke off"
            raise _Again("connection lost", f"{url} {how}: {e or type(e).__name__}") from None
        if status in not_offered:
            return {}
        if status >= 300:
            told = f"{url} answered {status}: {_message(data)}"
            if status in (401, 403, 404):
                raise ServingError(told, "Check the key, the address and serving.served_model.")
            if status in (408, 409, 429) or status >= 500:
                raise _Again(str(status), told, _seconds(asked_wait))
            raise RequestFailed(told)
        try:
            value = json.loads(data)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise _Again("garbage", f"{url} sent what is no JSON object: {data[:100]!r}")

    async def _is_there(self, endpoint: Endpoint) -> None:
        try:
            await asyncio.to_thread(endpoint.check)
        except ServingError as e:
            raise _Gone(e.message) from None


def _seconds(asked: str) -> float | None:
    """What `Retry-After` asks to wait for, if it is a number; never longer than our own longest wait."""
    try:
        return min(LONGEST_S, max(0.1, float(asked))) * random.uniform(1.0, 1.25)
    except ValueError:
        return None


def _message(data: bytes) -> str:
    """The words of an error, in whatever form servers send them."""
    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value)) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]
