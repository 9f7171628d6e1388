"""Text from OpenAI-compatible servers: seeds, retries, and errors told apart. Knows nothing of chains; which server is asked says
server_pool.py.

A request that can't be done (refused, or failed in all its tries) raises `RequestFailed` and costs one chain. Any other `ServingError`
stops the run, with all that is finished on disk: no server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import aiohttp  # a client of the servers' makers takes ten times as long for a request (3 ms), and longer with more in flight

from dsc_hub.config.recipe import GenerationConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import server_pool
from dsc_hub.inference.server_pool import Concurrency, PooledServer, ServerGone, ServerPool
from dsc_hub.inference.servers import Endpoint
from dsc_hub.inference.task_pool import raise_if_stopped

RETRIES = 5  # of a request for the same reason: 404, 408, 409, 5xx, a lost connection or an answer that can't be used
TIMEOUTS = 2  # retries after no answer at all: each has waited for long
TOO_MUCH = {"429", "503"}
# Retries after 429 or 503 while no other request is answered either: some minutes, as quotas are by the minute.
REFUSALS = 10
TURNS = 20  # refusals of a request while others are answered; then REFUSALS counts all the same
SHORTEST_KEY = 6  # characters; what is shorter ("none") is a word
DEATHS = 3  # servers that may be gone while they have a request; then it is the request
# Of those: from then on one such request is asked at a time, so that not all that were in flight fail for one.
SUSPECT = 2
OWN = {400, 403, 413, 422}  # statuses that say: not this request
NOT_OFFERED = {400, 403, 404, 405, 422, 501}  # what servers say to a route or a parameter that they don't have

Message = dict[str, str]
T = TypeVar("T")


class RequestFailed(ServingError):
    """One request can't be done; others may. `refused`: the server was there and says that it is the request."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class _Again(Exception):
    """A request that may be done on another try. `wait_s`: what the server asks to wait for."""

    def __init__(self, reason: str, told: str, wait_s: float | None = None, most: int | None = None) -> None:
        super().__init__(told)
        self.reason, self.wait_s, self.most = reason, wait_s, RETRIES if most is None else most


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int


@dataclass
class Generator:
    """Asks one or more servers. Use as an async context manager. Temperature, top_p and the length are stated in every request; what a
    server adds by itself (top_k, penalties) it adds, unless `settings.extra` says otherwise.

    How many requests are in flight is bounded by the stage that asks, which goes by `level`, and at each server by `concurrency`
    (a tuple: one for each). `retries` counts the requests that were sent again, by reason, and servers that came back;
    `requests` those that were answered, `new_tokens` what was written.
    """

    endpoints: Sequence[Endpoint]
    settings: GenerationConfig
    timeout_s: float
    critic: Endpoint | None = None
    concurrency: Concurrency | tuple[Concurrency, ...] = "auto"
    retries: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    new_tokens: int = 0

    async def __aenter__(self) -> Generator:
        self._pool = ServerPool(self.endpoints, self.concurrency, self.retries)
        self._critic = ServerPool([self.critic] if self.critic else [], "auto", self.retries)
        self._alone = asyncio.Lock()
        # How many connections there are is bounded by the level. Servers of vLLM's kind close idle ones after five seconds.
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close()
        self._critic.close()
        await self._http.close()

    def level(self) -> int:
        """How many requests all servers together should have now."""
        return self._pool.limit() + self._critic.limit() or 1

    async def complete(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """One chat completion. `model` overrides the endpoint's own name (an adapter beside its base)."""
        return await self._persist(self._pool, messages, seed, model)

    async def criticise(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """A critique: by the critic if there is one, else as any completion."""
        if self.critic is None:
            return await self.complete(messages, seed, model)
        return await self._persist(self._critic, messages, seed, None)

    async def surprise(self, text: str, model: str | None = None) -> float | None:
        """Mean surprise of the model at a text, in nats a token (the logarithm of its perplexity): asked of vLLM as the
        log-probabilities of a prompt, without a chat template and without the first token, which follows nothing.

        None where the server gives no such thing, which is not zero. Errors as in `complete`.
        """

        async def ask(server: PooledServer) -> float | None:
            asked = {
                "model": model or server.endpoint.model,
                "prompt": text,
                "max_tokens": 1,
                "temperature": 0.0,
                "seed": 0,
            }
            answer = await self._post(server, "completions", asked | {"prompt_logprobs": 0}, NOT_OFFERED)
            found = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
            nats = [-next(iter(token.values()))["logprob"] for token in found or () if token]
            return sum(nats) / len(nats) if nats else None

        return await self._until_done(self._pool, text, ask)

    async def _persist(self, pool: ServerPool, messages: list[Message], seed: int, model: str | None) -> Completion:
        beginning = "".join(m["content"] for m in messages[:2] if m["role"] != "assistant")

        async def ask(server: PooledServer) -> Completion:
            return await self._completion(server, messages, seed, model)

        return await self._until_done(pool, beginning, ask)

    async def _until_done(self, pool: ServerPool, beginning: str, ask: Callable[[PooledServer], Awaitable[T]]) -> T:
        """Ask until there is an answer: again after a while, elsewhere if there is another server."""
        tries, waits, deaths, seen = Counter[str](), 0, 0, pool.answered
        avoid: PooledServer | None = None
        while True:
            wait_s, sent = 0.0, 0.0
            async with self._alone if deaths >= SUSPECT else contextlib.nullcontext():
                server = await pool.acquire(beginning, avoid)
                try:
                    raise_if_stopped()
                    sent = time.monotonic()
                    found = await ask(server)
                    pool.answered += 1
                    return found
                except _Again as e:
                    avoid = server
                    if e.reason in TOO_MUCH:
                        avoid = None  # it is up, and asked again when it has room
                        if waits < RETRIES:
                            server.limit.too_much(sent, time.monotonic())
                        if pool.answered > seen and waits < TURNS:  # others are served: this one waits its turn
                            tries[e.reason] = 0
                        seen = pool.answered
                    tries[e.reason] += 1
                    if tries[e.reason] > e.most:
                        raise RequestFailed(f"{e}, {tries[e.reason]} times") from None
                    self.retries[e.reason] += 1
                    wait_s = e.wait_s or min(server_pool.LONGEST_S, server_pool.WAIT_S * 2**waits) * random.uniform(
                        0.75, 1.25
                    )
                    waits += 1
                except ServerGone as e:
                    self.retries["server gone"] += 1
                    deaths += 1
                    if deaths > DEATHS:
                        raise RequestFailed(
                            f"{deaths} servers were gone while they had this request; the last: {e}"
                        ) from None
                finally:
                    pool.release(server)
            await asyncio.sleep(wait_s)

    async def _completion(
        self, server: PooledServer, messages: list[Message], seed: int, model: str | None
    ) -> Completion:
        s = self.settings
        asked = {"model": model or server.endpoint.model, "messages": messages, "seed": seed, "n": 1}
        asked |= {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_new_tokens}
        answer = await self._post(server, "chat/completions", asked | s.extra)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            text, why = choice["message"]["content"] or "", choice["finish_reason"] or ""
            # Half a surrogate pair, which JSON can hold, is no text that could be written anywhere.
            text = text.encode("utf-8", "replace").decode()
            done = Completion(text, str(why), int(usage["prompt_tokens"]), int(usage["completion_tokens"]))
        except (AttributeError, LookupError, TypeError, ValueError):
            raise _Again("garbage", f"{server.endpoint.url} sent an answer without text or usage") from None
        self.requests += 1
        self.new_tokens += done.new_tokens
        server.limit.done(done.new_tokens, server.busy, time.monotonic())
        return done

    async def _post(
        self, server: PooledServer, route: str, body: Mapping[str, Any], not_offered: Collection[int] = ()
    ) -> dict[str, Any]:
        """One request, one answer; {} where the status says that the server has no such thing (`not_offered`). Else what went wrong
        is `_Again`, `ServerGone`, or RequestFailed for the request's own sake."""
        url = server.endpoint.url
        try:
            headers = {"Authorization": f"Bearer {server.endpoint.api_key}"}
            post = self._http.post(
                f"{url}/{route}", json=body, headers=headers, allow_redirects=False, proxy=server.proxy
            )
            async with post as answer:
                status, data, asked_wait = answer.status, await answer.read(), answer.headers.get("Retry-After", "")
        except TimeoutError:
            await server.pool.check_health(server)
            raise _Again("no answer in time", f"{url} gave no answer in {self.timeout_s:g} s", most=TIMEOUTS) from None
        except (aiohttp.ClientError, OSError) as e:
            await server.pool.check_health(server)
            how = "can't be reached" if isinstance(e, aiohttp.ClientConnectorError) else "broke off"
            raise _Again("connection lost", f"{url} {how}: {e or type(e).__name__}") from None
        if status in not_offered:
            return {}
        if status >= 300:
            message = f"{url} answered {status}: {_message(data, server.endpoint.api_key)}"
            if status in (401, 402):
                server.pool.retire(server, ServingError(message, "Check the key, and what it is allowed."))
                raise ServerGone(message)
            if status == 403 or (status >= 500 and str(status) not in TOO_MUCH):
                await server.pool.check_health(server)  # a proxy may speak for a server that is gone
            if status in (404, 408, 409, 429) or status >= 500:
                most = REFUSALS if str(status) in TOO_MUCH else RETRIES
                raise _Again(str(status), message, _seconds(asked_wait), most)
            raise RequestFailed(message, refused=status in OWN)
        try:
            value = json.loads(data)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise _Again("garbage", f"{url} sent what is no JSON object: {data[:100]!r}")


def _seconds(asked: str) -> float | None:
    """What `Retry-After` asks to wait for, if it is a number; never longer than our own longest wait."""
    try:
        return min(server_pool.LONGEST_S, max(0.1, float(asked))) * random.uniform(1.0, 1.25)
    except ValueError:
        return None


def _message(data: bytes, key: str) -> str:
    """The words of an error, in whatever form servers send them; without the key, which some repeat."""
    text = data.decode("utf-8", "replace")
    try:
        value = json.loads(text)
        value = value.get("error", value)
        text = str(value.get("message", value)) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError):
        pass
    text = " ".join(text.split())
    return (text.replace(key, "[the key]") if len(key) >= SHORTEST_KEY else text)[:300]
