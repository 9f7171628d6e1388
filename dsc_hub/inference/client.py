"""Client of OpenAI-compatible servers: seeds, retries and classification of errors.

Independent of chains. server_pool.py chooses the server of a request. A request that can't be done (refused, or failed
in all its tries) raises `RequestFailed` and costs one chain. Any other `ServingError` stops the run with all finished
work on disk: no server is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar

import aiohttp  # the vendors' client library needs ten times as long per request (3 ms), more with many in flight

from dsc_hub.chain.chain import Message
from dsc_hub.chain.hygiene import LENGTH, STOP, THINKING
from dsc_hub.chain.thinking import split_thought
from dsc_hub.config.sampling import GenerationConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import server_pool
from dsc_hub.inference.quota import Pacer, Quota, expected_tokens
from dsc_hub.inference.requests import chat_body, error_message, generation_parameters
from dsc_hub.inference.server_pool import Concurrency, PooledServer, ServerGone, ServerPool
from dsc_hub.inference.servers import Endpoint
from dsc_hub.inference.task_pool import raise_if_stopped

RETRIES = 5  # per request and reason: 404, 408, 409, 5xx, a lost connection or an unusable reply
TIMEOUTS = 2  # retries after a timeout; fewer, since each try has waited long
TOO_MUCH = {"429", "503"}
# Retries after 429 or 503 while no other request is answered either: some minutes, since quotas are per minute.
REFUSALS = 10
TURNS = 20  # refusals of a request while others are answered; after that REFUSALS applies as well
DEATHS = 3  # servers that may become unreachable during a request before the request is blamed
# From this number on, such requests are sent one at a time, so that one of them does not fail all in flight.
SUSPECT = 2
OWN = {400, 403, 413, 422}  # status codes that refuse this particular request
NOT_OFFERED = {400, 403, 404, 405, 422, 501}  # status codes for a route or parameter that the server does not support

# Words of servers for an answer that the model ended itself, and for one that was cut at the limit.
STOPS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"}
LENGTHS = {"length", "max_tokens", "max_length", "model_length"}

T = TypeVar("T")


class RequestFailed(ServingError):
    """One request can't be done; others may succeed. `refused`: the server is up and rejected this request."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class _Again(Exception):
    """A request that may succeed on another try. `wait_s`: seconds that the server requests to wait."""

    def __init__(self, reason: str, told: str, wait_s: float | None = None, most: int | None = None) -> None:
        super().__init__(told)
        self.reason, self.wait_s, self.most = reason, wait_s, RETRIES if most is None else most


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer of a server. `thought` is what the model thought before `text`, "" if nothing.

    `finish_reason`: STOP, LENGTH, THINKING (cut while it still thought), or whatever else the server gave.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    new_tokens: int  # those of the thought included
    thought: str = ""


@dataclass
class Generator:
    """Client of one or more servers; use as an async context manager.

    Every request states temperature, top_p and the length, as far as the endpoint takes them (`Endpoint.form`). Other
    sampling settings (top_k, penalties) are the server's defaults unless `settings.extra` sets them.

    The number of requests in flight is bounded by the calling stage, which reads `level`, and at each server by
    `concurrency` (a tuple: one value per server). `retries` counts repeated requests by reason, and servers that came
    back; `requests` counts answered requests, `new_tokens` the generated tokens.
    """

    endpoints: Sequence[Endpoint]
    settings: GenerationConfig
    timeout_s: float
    critic: Endpoint | None = None
    concurrency: Concurrency | tuple[Concurrency, ...] = "auto"
    quota: Quota | None = None  # stated for each of `endpoints`; None: no limit
    retries: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    new_tokens: int = 0

    async def __aenter__(self) -> Generator:
        self._pool = ServerPool(self.endpoints, self.concurrency, self.retries)
        self._critic = ServerPool([self.critic] if self.critic else [], "auto", self.retries)
        self._alone = asyncio.Lock()
        self._pacers = {id(s): Pacer(replace(self.quota)) for s in self._pool.all} if self.quota else {}
        # The level bounds the number of connections. Servers such as vLLM close idle ones after five seconds.
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
        """Return the current concurrency limit of all servers together."""
        return self._pool.limit() + self._critic.limit() or 1

    async def complete(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """Return one chat completion. `model` overrides the endpoint's model name (an adapter beside its base)."""
        return await self._persist(self._pool, messages, seed, model)

    async def criticise(self, messages: list[Message], seed: int, model: str | None = None) -> Completion:
        """Return a critique: from the critic if there is one, else from the base servers."""
        if self.critic is None:
            return await self.complete(messages, seed, model)
        return await self._persist(self._critic, messages, seed, None)

    async def surprise(self, text: str, model: str | None = None) -> float | None:
        """Return the mean surprisal of a text under the model, in nats per token (the logarithm of its perplexity).

        It is computed from vLLM's prompt log-probabilities, without a chat template and without the first token, which
        has no context. None (not zero) if the server does not return them. Errors as in `complete`.
        """

        async def ask(server: PooledServer) -> float | None:
            body = {
                "model": model or server.endpoint.model,
                "prompt": text,
                "max_tokens": 1,
                "temperature": 0.0,
                "seed": 0,
            }
            answer = await self._post(server, "completions", body | {"prompt_logprobs": 0}, NOT_OFFERED)
            logprobs = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
            nats = [-next(iter(token.values()))["logprob"] for token in logprobs or () if token]
            return sum(nats) / len(nats) if nats else None

        return await self._until_done(self._pool, text, ask)

    async def _persist(self, pool: ServerPool, messages: list[Message], seed: int, model: str | None) -> Completion:
        beginning = "".join(m["content"] for m in messages[:2] if m["role"] != "assistant")

        async def ask(server: PooledServer) -> Completion:
            return await self._completion(server, messages, seed, model)

        return await self._until_done(pool, beginning, ask)

    async def _until_done(self, pool: ServerPool, beginning: str, ask: Callable[[PooledServer], Awaitable[T]]) -> T:
        """Send a request until it is answered: retry after a pause, at another server if there is one."""
        tries, waits, deaths, answered_before = Counter[str](), 0, 0, pool.answered
        avoid: PooledServer | None = None
        while True:
            wait_s, sent = 0.0, 0.0
            async with self._alone if deaths >= SUSPECT else contextlib.nullcontext():
                server = await pool.acquire(beginning, avoid)
                try:
                    raise_if_stopped()
                    sent = time.monotonic()
                    result = await ask(server)
                    pool.answered += 1
                    return result
                except _Again as e:
                    avoid = server
                    if e.reason in TOO_MUCH:
                        avoid = None  # it is up; retry there as soon as it has room
                        if waits < RETRIES:
                            server.limit.too_much(sent, time.monotonic())
                        # others are served: this one keeps waiting
                        if pool.answered > answered_before and waits < TURNS:
                            tries[e.reason] = 0
                        answered_before = pool.answered
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
        endpoint, extra = server.endpoint, server.endpoint.extra
        parameters = generation_parameters(self.settings, seed)
        extra = self.settings.extra if extra is None else extra
        if self.settings.max_thinking_tokens and endpoint.ends_thoughts:
            extra = {**extra, "thinking_token_budget": self.settings.max_thinking_tokens}
        body = chat_body(model or endpoint.model, messages, parameters, endpoint.form, extra)
        expected = expected_tokens(messages, self.settings.most_tokens)
        pacer = self._pacers.get(id(server))
        if pacer:
            await pacer.wait(expected, raise_if_stopped)
        answer = await self._post(server, "chat/completions", body)
        try:
            choice, usage = answer["choices"][0], answer["usage"]
            message, reason = choice["message"], _finish_reason(choice["finish_reason"])
            said = split_thought(message["content"], message.get("reasoning_content") or message.get("reasoning"))
            # JSON can hold half a surrogate pair, which can't be encoded as UTF-8.
            text, thought = (part.encode("utf-8", "replace").decode() for part in (said.text, said.thought))
            reason = THINKING if said.is_thinking and reason in (STOP, LENGTH) else reason
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            completion = Completion(text, reason, *tokens, thought)
        except (AttributeError, LookupError, TypeError, ValueError):
            raise _Again("garbage", f"{server.endpoint.url} sent an answer without text or usage") from None
        if pacer:
            pacer.quota.settle(expected, completion.prompt_tokens + completion.new_tokens)
        self.requests += 1
        self.new_tokens += completion.new_tokens
        server.limit.done(completion.new_tokens, server.busy, time.monotonic())
        return completion

    async def _post(
        self, server: PooledServer, route: str, body: Mapping[str, Any], not_offered: Collection[int] = ()
    ) -> dict[str, Any]:
        """Send one request and return its JSON; {} if the status is in `not_offered` (the server lacks the feature).

        Failures raise `_Again`, `ServerGone`, or RequestFailed if the request itself is at fault.
        """
        url = server.endpoint.url
        try:
            headers = {"Authorization": f"Bearer {server.endpoint.api_key}"}
            post = self._http.post(
                f"{url}/{route}", json=body, headers=headers, allow_redirects=False, proxy=server.proxy
            )
            async with post as answer:
                status, data, retry_after = answer.status, await answer.read(), answer.headers.get("Retry-After", "")
        except TimeoutError:
            await server.pool.check_health(server)
            raise _Again("no answer in time", f"{url} gave no answer in {self.timeout_s:g} s", most=TIMEOUTS) from None
        except (aiohttp.ClientError, OSError) as e:
            await server.pool.check_health(server)
            problem = "can't be reached" if isinstance(e, aiohttp.ClientConnectorError) else "broke off"
            raise _Again("connection lost", f"{url} {problem}: {e or type(e).__name__}") from None
        if status in not_offered:
            return {}
        if status >= 300:
            message = f"{url} answered {status}: {error_message(data, server.endpoint.api_key)}"
            if status in (401, 402):
                server.pool.retire(server, ServingError(message, "Check the key, and what it is allowed."))
                raise ServerGone(message)
            if status == 403 or (status >= 500 and str(status) not in TOO_MUCH):
                await server.pool.check_health(server)  # a proxy may have replied for an unreachable server
            if status in (404, 408, 409, 429) or status >= 500:
                most = REFUSALS if str(status) in TOO_MUCH else RETRIES
                raise _Again(str(status), message, _retry_after(retry_after), most)
            raise RequestFailed(message, refused=status in OWN)
        try:
            value = json.loads(data)
            if isinstance(value, dict):
                return value
        except ValueError:
            pass
        raise _Again("garbage", f"{url} sent what is no JSON object: {data[:100]!r}")


def _finish_reason(given: str | None) -> str:
    """Return why an answer ended, in one word for each reason; servers have several."""
    name = str(given or "")
    return STOP if name.lower() in STOPS else LENGTH if name.lower() in LENGTHS else name


def _retry_after(asked: str) -> float | None:
    """Return the seconds of a `Retry-After` header, capped at our own longest wait, with jitter added.

    None if the header is not a number.
    """
    try:
        return min(server_pool.LONGEST_S, max(0.1, float(asked))) * random.uniform(1.0, 1.25)
    except ValueError:
        return None
