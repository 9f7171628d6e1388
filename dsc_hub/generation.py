"""Text from OpenAI-compatible servers: which one is asked, seeds, retries, and errors told apart. Knows nothing of chains.

A request that fails for its own sake (too long, answer garbled again and again) raises `RequestFailed` and costs one chain. A
server that is gone is waited for, or started again, while its requests go to the others; `ServingError` stops the run when
none comes back, with all that is finished on disk.
"""

from __future__ import annotations

import asyncio
import random
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx
import openai

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


class RequestFailed(ServingError):
    """One request can't be done; others may."""


class _Again(Exception):
    """A request that may be done on another try. `wait_s`: what the server asks to wait for."""

    def __init__(self, reason: str, told: str, wait_s: float | None = None, most: int = RETRIES) -> None:
        super().__init__(told)
        self.reason, self.wait_s, self.most = reason, wait_s, most


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
    client: openai.AsyncOpenAI
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

    How many requests are in flight is bounded by the stage that asks, which goes by `level`. `retries` counts the requests that
    were sent again, by reason, and servers that came back; `new_tokens` what was written.
    """

    endpoints: Sequence[Endpoint]
    settings: Generation
    timeout_s: float
    critic: Endpoint | None = None
    concurrency: int | Literal["auto"] = "auto"
    retries: Counter[str] = field(default_factory=Counter)
    new_tokens: int = 0
    _lanes: list[_Lane] = field(default_factory=list, init=False)
    _critic: list[_Lane] = field(default_factory=list, init=False)

    async def __aenter__(self) -> Generator:
        self._changed = asyncio.Condition()
        self._lanes = [self._lane(e) for e in self.endpoints]
        self._critic = [self._lane(self.critic)] if self.critic else []
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in (*self._lanes, *self._critic):
            if lane.revival:
                lane.revival.cancel()
            await lane.client.close()

    def _lane(self, endpoint: Endpoint) -> _Lane:
        http = openai.DefaultAsyncHttpxClient(
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None), timeout=self.timeout_s
        )
        client = openai.AsyncOpenAI(
            base_url=endpoint.url, api_key=endpoint.api_key, max_retries=0, timeout=self.timeout_s, http_client=http
        )
        return _Lane(endpoint, client, Level(self.concurrency))

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
            asked = {"model": model or lane.endpoint.model, "prompt": text, "max_tokens": 1, "temperature": 0.0}
            try:
                answer: Any = await lane.client.completions.create(**asked, seed=0, extra_body={"prompt_logprobs": 0})
            except openai.APIStatusError as e:
                if e.status_code in NOT_OFFERED:
                    return None
                raise
            found = ((answer.choices or [None])[0].model_extra or {}).get("prompt_logprobs") if answer.choices else None
            nats = [-next(iter(token.values()))["logprob"] for token in found or () if token]
            return sum(nats) / len(nats) if nats else None

        return await self._until_done(self._lanes, text, ask)

    async def _persist(
        self, lanes: Sequence[_Lane], messages: list[Message], seed: int, model: str | None
    ) -> Completion:
        beginning = "".join(m["content"] for m in messages[:2] if m["role"] != "assistant")

        async def ask(lane: _Lane) -> Completion:
            return await self._completion(lane, messages, seed, model)

        done: Completion = await self._until_done(lanes, beginning, ask)
        return done

    async def _until_done(self, lanes: Sequence[_Lane], beginning: str, ask: Any) -> Any:
        """Ask until there is an answer: again after a while, or elsewhere."""
        tries, deaths = Counter[int](), 0
        while True:
            lane = await self._free(lanes, beginning)
            lane.busy += 1
            try:
                return await _told(lane.endpoint, self.timeout_s, ask(lane))
            except _Again as e:
                tries[e.most] += 1
                if tries[e.most] > e.most:
                    raise RequestFailed(f"{e}, {tries.total()} times") from None
                self.retries[e.reason] += 1
                if e.reason in TOO_MUCH:
                    lane.level.too_much()
                wait_s = e.wait_s or min(LONGEST_S, WAIT_S * 2 ** (tries.total() - 1)) * random.uniform(0.75, 1.25)
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
        for n in range(REVIVALS):
            await asyncio.sleep(min(LONGEST_S, 2 * WAIT_S * 4**n) * random.uniform(0.75, 1.25))
            try:
                await self._bring_back(lane.endpoint)
            except ServingError as e:
                if n == REVIVALS - 1:
                    lane.gone = ServingError(
                        f"{lane.endpoint.url} did not come back in {REVIVALS} tries: {e.message}",
                        "What is finished is kept; run the same command again when it can be reached.",
                    )
            else:
                say(f"{lane.endpoint.url} is back")
                self.retries["server back"] += 1
                break
        lane.revival = None
        async with self._changed:
            self._changed.notify_all()

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Start a server of our own again, or look whether another's is there. ServingError if it is not."""
        if endpoint.restart is None:
            await asyncio.to_thread(endpoint.check)
            return
        endpoint.restart()
        while not await asyncio.to_thread(endpoint.is_ready):
            await asyncio.sleep(0.25)

    async def _completion(self, lane: _Lane, messages: list[Message], seed: int, model: str | None) -> Completion:
        s, url = self.settings, lane.endpoint.url
        answer: Any = await lane.client.chat.completions.create(
            model=model or lane.endpoint.model,
            messages=messages,  # type: ignore[arg-type]
            seed=seed,
            temperature=s.temperature,
            top_p=s.top_p,
            max_tokens=s.max_new_tokens,
            n=1,
            extra_body=s.extra or None,
        )
        try:
            choice, usage = answer.choices[0], answer.usage
            text, why = choice.message.content or "", choice.finish_reason or ""
            asked, new = int(usage.prompt_tokens), int(usage.completion_tokens)
        except (AttributeError, IndexError, TypeError, ValueError):
            raise _Again("garbage", f"{url} sent an answer without text or usage") from None
        self.new_tokens += new
        lane.level.done(new, lane.busy, time.monotonic())
        # Half a surrogate pair, which JSON can hold, is no text that could be written anywhere.
        return Completion(text.encode("utf-8", "replace").decode(), why, asked, new)


async def _told(endpoint: Endpoint, timeout_s: float, asked: Any) -> Any:
    """The client's errors as ours: `_Again`, `_Gone`, RequestFailed for the request's own sake, or ServingError where no
    request will be answered."""
    url = endpoint.url
    try:
        return await asked
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
        raise ServingError(
            f"{url} refuses: {_short(e)}", "Check the key, the address and serving.served_model."
        ) from None
    except openai.APIStatusError as e:
        told = f"{url} answered {e.status_code}: {_short(e)}"
        if e.status_code in (408, 409, 429) or e.status_code >= 500:
            raise _Again(str(e.status_code), told, _asked_wait(e.response.headers)) from None
        raise RequestFailed(told) from None
    except openai.APITimeoutError:
        why, told, most = "no answer in time", f"{url} gave no answer in {timeout_s:g} s", TIMEOUTS
    except openai.APIConnectionError as e:
        why, told, most = "connection lost", f"{url} can't be reached: {e.__cause__ or e}", RETRIES
    except (openai.APIError, ValueError) as e:  # an answer that is no JSON, or not the one that was asked for
        raise _Again("garbage", f"{url} sent what can't be read: {' '.join(str(e).split())[:200]}") from None
    try:
        await asyncio.to_thread(endpoint.check)
    except ServingError as e:
        raise _Gone(e.message) from None
    raise _Again(why, told, most=most)


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait for, if it does and they are few."""
    try:
        return min(LONGEST_S, max(0.1, float(headers.get("retry-after", "")))) * random.uniform(1.0, 1.25)
    except ValueError:
        return None


def _short(error: openai.APIStatusError) -> str:
    return " ".join(str(error.message).split())[:300]
