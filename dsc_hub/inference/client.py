"""Client of OpenAI-compatible servers: seeds, retries and classification of errors.

Independent of chains. server_pool.py chooses the server of a request, retries.py when it is sent again, replies.py
validates what comes back. A request that can't be done (refused by all servers, or failed in all its tries) raises
`RequestFailed` and costs one chain. Any other `ServingError` stops the run with all finished work on disk: no server is
left.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, TypeVar

import aiohttp  # the vendors' client library needs ten times as long per request (3 ms), more with many in flight

from dsc_hub.chain.hygiene import LENGTH, STOP, THINKING
from dsc_hub.chain.thinking import split_thought
from dsc_hub.config.serving import GenerationConfig
from dsc_hub.errors import ServingError
from dsc_hub.inference import replies
from dsc_hub.inference.concurrency import first_of_many
from dsc_hub.inference.pacing import Pacer, StatedQuota, expected_tokens
from dsc_hub.inference.prompt_lengths import PromptLengths
from dsc_hub.inference.requests import chat_body, error_message, generation_parameters
from dsc_hub.inference.retries import (
    DEATHS,
    REFUSALS,
    RETRIES,
    SUSPECT,
    TIMEOUTS,
    TOO_MUCH,
    Again,
    RequestFailed,
    ServerGone,
    Tries,
    retry_after,
)
from dsc_hub.inference.server_pool import Concurrency, PooledServer, ServerPool
from dsc_hub.inference.servers import Endpoint
from dsc_hub.inference.task_pool import aside, raise_if_stopped
from dsc_hub.records import Message, Tool

OWN = {400, 403, 413, 422}  # status codes that refuse this particular request
NOT_OFFERED = {400, 403, 404, 405, 422, 501}  # status codes for a route or parameter that the server does not support
# Requests that fail for good with no answer between them, from which on the server gets one that it answered before.
CHECKED_FROM = 10

# Words of servers for an answer that the model ended itself, and for one that was cut at the limit.
STOPS = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"}
LENGTHS = {"length", "max_tokens", "max_length", "model_length"}

T = TypeVar("T")


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
    quota: StatedQuota | None = None  # stated for each of `endpoints`; None: no limit
    retries: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    new_tokens: int = 0

    async def __aenter__(self) -> Generator:
        first = first_of_many(self.settings.most_tokens, self.timeout_s)
        self._pool = ServerPool(self.endpoints, self.concurrency, self.retries, first)
        self._critic = ServerPool([self.critic] if self.critic else [], "auto", self.retries, first)
        self._alone = asyncio.Lock()
        self._lengths = PromptLengths()
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

    async def complete(
        self, messages: list[Message], seed: int, model: str | None = None, tools: Sequence[Tool] = ()
    ) -> Completion:
        """Return one chat completion. `model` overrides the endpoint's model name (an adapter beside its base).

        `tools` are shown to the model by its chat template; what it writes is text, also where it calls one.
        """
        return await self._persist(self._pool, messages, seed, model, tools)

    async def criticise(
        self, messages: list[Message], seed: int, model: str | None = None, tools: Sequence[Tool] = ()
    ) -> Completion:
        """Return a critique: from the critic if there is one, else from the base servers."""
        if self.critic is None:
            return await self.complete(messages, seed, model, tools)
        return await self._persist(self._critic, messages, seed, None, tools)

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
            try:
                choices = replies.validate(replies.ScoredReply, answer).choices
            except replies.BadReply as e:
                raise Again("garbage", f"{server.endpoint.url} sent {e}") from None
            logprobs = choices[0].prompt_logprobs if choices else None
            nats = [-next(iter(token.values())).logprob for token in logprobs or () if token]
            return sum(nats) / len(nats) if nats else None

        return await self._until_done(self._pool, text, ask)

    async def _persist(
        self, pool: ServerPool, messages: list[Message], seed: int, model: str | None, tools: Sequence[Tool]
    ) -> Completion:
        beginning = "".join(m["content"] for m in messages[:2] if m["role"] != "assistant")

        async def ask(server: PooledServer) -> Completion:
            completion = await self._completion(server, messages, seed, model, tools)
            pool.known = ask
            return completion

        if pool.known is None:
            pool.latest = ask
        return await self._until_done(pool, beginning, ask)

    async def _until_done(self, pool: ServerPool, beginning: str, ask: Callable[[PooledServer], Awaitable[T]]) -> T:
        """Send a request until it is answered: at once to another server if there is one, else after a pause."""
        tries = Tries[PooledServer](pool.answered)
        while True:
            pause_s = 0.0
            async with self._alone if tries.deaths >= SUSPECT else contextlib.nullcontext():
                server = await pool.acquire(beginning, tries.avoid(), tries.full)
                number = server.streak.send()
                try:
                    raise_if_stopped()
                    result = await ask(server)
                    pool.succeeded(server, number, tries.refused_by)
                    return result
                except Again as e:
                    pause_s = await self._tried_in_vain(pool, server, tries, e, number)
                except RequestFailed as e:
                    tries.refused_by[server] = e
                    if not pool.others(tries.avoid()):
                        raise await self._blamed(pool, server, e) from None
                    self.retries["refused"] += 1
                except ServerGone as e:
                    self.retries["server gone"] += 1
                    tries.deaths += 1
                    if tries.deaths > DEATHS:
                        raise RequestFailed(
                            f"{tries.deaths} servers were gone while they had this request; the last: {e}"
                        ) from None
                finally:
                    server.streak.dropped(number)
                    pool.release(server)
            if pause_s:
                async with aside():
                    await asyncio.sleep(pause_s)

    async def _tried_in_vain(
        self, pool: ServerPool, server: PooledServer, tries: Tries[PooledServer], error: Again, number: int
    ) -> float:
        """Record a failed try; return the pause in seconds before the next. RequestFailed if there is none."""
        pool.failed(server, error, number)
        try:
            others_answered = tries.count(error, pool.answered)
        except RequestFailed as e:
            raise await self._blamed(pool, server, e) from None
        self.retries[error.reason] += 1
        (tries.full if error.is_overload else tries.failed_by).add(server)
        if not server.is_open or (error.is_overload and server.quota.wait_s(time.monotonic())):
            return 0.0  # the request gets a place at another server, or waits for the next one
        # A full server has room again soon; one that errs does not, so that waiting for a place elsewhere pays.
        if pool.others({*tries.avoid(), *tries.full}, with_room=error.is_overload):
            return 0.0
        return tries.pause(error, others_answered)

    async def _blamed(self, pool: ServerPool, server: PooledServer, error: RequestFailed) -> RequestFailed:
        """Return the error of a request that failed for good, with whether the server still answers others."""
        pool.failed_in_a_row += 1
        if pool.failed_in_a_row >= CHECKED_FROM and await pool.still_answers(server):
            pool.failed_in_a_row, error.others_answered = 0, True
        return error

    async def _completion(
        self, server: PooledServer, messages: list[Message], seed: int, model: str | None, tools: Sequence[Tool]
    ) -> Completion:
        endpoint, extra = server.endpoint, server.endpoint.extra
        extra = dict(self.settings.extra if extra is None else extra)
        if self.settings.max_thinking_tokens and endpoint.ends_thoughts:
            extra["thinking_token_budget"] = self.settings.max_thinking_tokens
        if tools:  # with "none" servers leave calls in the text, as training reads it
            extra |= {"tools": list(tools), "tool_choice": "none"}
        parameters = generation_parameters(self.settings, seed)
        body = chat_body(model or endpoint.model, messages, parameters, endpoint.form, extra)
        expected = expected_tokens(messages, tools, self.settings.most_tokens)
        pacer = self._pacers.get(id(server))
        if pacer:
            await pacer.wait(expected, raise_if_stopped)
        reply = await self._chat(server, body)
        choice, usage = reply.choices[0], reply.usage
        await self._check_length(server, body, usage.prompt_tokens)
        message, reason = choice.message, _finish_reason(choice.finish_reason)
        said = split_thought(message.content, message.reasoning_content or message.reasoning)
        reason = THINKING if said.is_thinking and reason in (STOP, LENGTH) else reason
        completion = Completion(said.text, reason, usage.prompt_tokens, usage.completion_tokens, said.thought)
        if pacer:
            pacer.quota.settle(expected, completion.prompt_tokens + completion.new_tokens)
        self.requests += 1
        self.new_tokens += completion.new_tokens
        server.quota.used(completion.prompt_tokens + completion.new_tokens)
        server.limit.done(completion.new_tokens, server.busy, time.monotonic())
        return completion

    async def _chat(self, server: PooledServer, body: Mapping[str, Any]) -> replies.ChatReply:
        try:
            return replies.chat_reply(await self._post(server, "chat/completions", body))
        except replies.BadReply as e:
            raise Again("garbage", f"{server.endpoint.url} sent {e}") from None

    async def _check_length(self, server: PooledServer, body: Mapping[str, Any], prompt_tokens: int) -> None:
        """Give a server up that cuts prompts: its prompt tokens are fewer than the messages can have."""
        model, messages, tools = str(body["model"]), body["messages"], body.get("tools")
        least = self._lengths.least(model, messages, tools)
        # 0: not counted
        if server.counts_prompts and 0 < prompt_tokens < least:
            if server.failure is not None:
                raise ServerGone(server.failure.message)
            if server.count_check is None:  # one for all requests that come together
                server.count_check = asyncio.ensure_future(self._cuts(server, body, least))
            if not await asyncio.shield(server.count_check):
                server.counts_prompts = False
                return
            message = (
                f"{server.endpoint.url} cuts prompts: it counts {prompt_tokens} prompt tokens where the messages have "
                f"{least} or more"
            )
            hint = "Raise the server's context for each request (llama-server: --ctx-size divided by --parallel;"
            hint += " Ollama: OLLAMA_CONTEXT_LENGTH), or shorten the prompts or generation.max_new_tokens."
            if server.failure is None:
                server.pool.retire(server, ServingError(message, hint))
            raise ServerGone(message)
        self._lengths.remember(model, messages, prompt_tokens, tools)

    async def _cuts(self, server: PooledServer, body: Mapping[str, Any], least: int) -> bool:
        """Return whether a server counts too few prompt tokens for new messages too, which no cache can hold."""
        try:
            first, *others = body["messages"]
            first = {**first, "content": f"{secrets.token_hex(8)}\n{first['content']}"}
            reply = await self._chat(server, {**body, "messages": [first, *others]})
            return reply.usage.prompt_tokens < least
        finally:
            server.count_check = None

    async def _post(
        self, server: PooledServer, route: str, body: Mapping[str, Any], not_offered: Collection[int] = ()
    ) -> dict[str, Any]:
        """Send one request and return its JSON; {} if the status is in `not_offered` (the server lacks the feature).

        Failures raise `Again`, `ServerGone`, or RequestFailed if the request itself is at fault.
        """
        url, spent, sent = server.endpoint.url, server.quota.spent, time.monotonic()
        try:
            headers = {"Authorization": f"Bearer {server.endpoint.api_key}"}
            post = self._http.post(
                f"{url}/{route}", json=body, headers=headers, allow_redirects=False, proxy=server.proxy
            )
            async with post as answer:
                status, headers_back, data = answer.status, answer.headers, await _read(answer)
        except TimeoutError:
            await server.pool.check_health(server)
            raise Again("no answer in time", f"{url} gave no answer in {self.timeout_s:g} s", most=TIMEOUTS) from None
        except (aiohttp.ClientError, OSError) as e:
            await server.pool.check_health(server)
            problem = "can't be reached" if isinstance(e, aiohttp.ClientConnectorError) else "broke off"
            raise Again("connection lost", f"{url} {problem}: {e or type(e).__name__}") from None
        server.quota.report(headers_back, spent, sent)
        if data is None:
            raise Again("garbage", f"{url} sent more than {replies.MOST_BYTES / 2**20:.0f} MiB")
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
                raise Again(str(status), message, retry_after(headers_back.get("Retry-After", "")), most)
            raise RequestFailed(message, refused=status in OWN)
        try:
            return replies.parse_object(data)
        except replies.BadReply as e:
            raise Again("garbage", f"{url} sent {e}") from None


async def _read(answer: aiohttp.ClientResponse) -> bytes | None:
    """Return the body of a reply; None if it is longer than any that is meant."""
    parts, size = [], 0
    async for part in answer.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > replies.MOST_BYTES:
            return None
    return b"".join(parts)


def _finish_reason(given: str | None) -> str:
    """Return why an answer ended, in one word for each reason; servers have several."""
    name = str(given or "")
    return STOP if name.lower() in STOPS else LENGTH if name.lower() in LENGTHS else name
