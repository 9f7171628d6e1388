"""Text from OpenAI-compatible servers: retries, seeds, and errors told apart. Knows nothing of chains.

A request that fails for its own sake (too long, answer garbled) raises `RequestFailed` and costs one chain; a server that
is gone raises `ServingError` and stops the run, with all that is finished on disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import openai

from dsc_hub.errors import ServingError
from dsc_hub.recipe import Generation
from dsc_hub.serving import Endpoint

RETRIES = 5  # with exponential back-off and jitter, on 408, 409, 429, 5xx and lost connections

NOT_OFFERED = {400, 403, 404, 405, 422, 501}  # what servers say to a route or a parameter that they don't have


class RequestFailed(ServingError):
    """One request can't be done; others may."""


@dataclass(frozen=True, slots=True)
class Completion:
    text: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    new_tokens: int


class Generator:
    """Asks one or more endpoints, the least busy first. Use as an async context manager.

    Sampling settings are stated in every request: servers have defaults of their own.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], settings: Generation, timeout_s: float, critic: Endpoint | None = None
    ) -> None:
        self._settings, self._timeout_s = settings, timeout_s
        self._endpoints = list(endpoints)
        self._busy = [0] * len(self._endpoints)
        self._clients: list[openai.AsyncOpenAI] = []
        self._critic = critic
        self._turn = itertools.count()

    async def __aenter__(self) -> Generator:
        # How many requests are in flight is bounded by the stage that asks, not here.
        self._clients = [
            openai.AsyncOpenAI(base_url=e.url, api_key=e.api_key, max_retries=RETRIES, timeout=self._timeout_s)
            for e in (*self._endpoints, *([self._critic] if self._critic else ()))
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(c.close() for c in self._clients))

    async def complete(self, messages: list[dict[str, str]], seed: int, model: str | None = None) -> Completion:
        """One chat completion. `model` overrides the endpoint's own name (an adapter beside its base)."""
        i = min(
            range(len(self._endpoints)), key=lambda k: (self._busy[k], (next(self._turn) + k) % len(self._endpoints))
        )
        self._busy[i] += 1
        try:
            return await self._ask(self._clients[i], self._endpoints[i], messages, seed, model)
        finally:
            self._busy[i] -= 1

    async def criticise(self, messages: list[dict[str, str]], seed: int, model: str | None = None) -> Completion:
        """A critique: by the critic if there is one, else as any completion."""
        if self._critic is None:
            return await self.complete(messages, seed, model)
        return await self._ask(self._clients[-1], self._critic, messages, seed, None)

    async def surprise(self, text: str, model: str | None = None) -> float | None:
        """Mean surprise of the model at a text, in nats a token (the logarithm of its perplexity): asked of vLLM as the
        log-probabilities of a prompt, without a chat template and without the first token, which follows nothing.

        None where the server gives no such thing, which is not zero. Errors as in `complete`.
        """
        endpoint, client = self._endpoints[0], self._clients[0]
        asked = {"model": model or endpoint.model, "prompt": text, "max_tokens": 1, "temperature": 0.0, "seed": 0}
        with _told(endpoint, self._timeout_s):
            try:
                answer: Any = await client.with_options(max_retries=1).completions.create(
                    **asked, extra_body={"prompt_logprobs": 0}
                )
            except openai.APIStatusError as e:
                if e.status_code in NOT_OFFERED:
                    return None
                raise
        found = ((answer.choices or [None])[0].model_extra or {}).get("prompt_logprobs") if answer.choices else None
        nats = [-next(iter(token.values()))["logprob"] for token in found or () if token]
        return sum(nats) / len(nats) if nats else None

    async def _ask(
        self,
        client: openai.AsyncOpenAI,
        endpoint: Endpoint,
        messages: list[dict[str, str]],
        seed: int,
        model: str | None,
    ) -> Completion:
        s = self._settings
        with _told(endpoint, self._timeout_s):
            answer: Any = await client.chat.completions.create(
                model=model or endpoint.model,
                messages=messages,
                seed=seed,
                temperature=s.temperature,
                top_p=s.top_p,
                max_tokens=s.max_new_tokens,
                n=1,
            )
        try:
            choice = answer.choices[0]
            return Completion(
                choice.message.content or "",
                choice.finish_reason or "",
                answer.usage.prompt_tokens,
                answer.usage.completion_tokens,
            )
        except (AttributeError, IndexError, TypeError):
            raise RequestFailed(f"{endpoint.url} sent an answer without text or usage") from None


@contextlib.contextmanager
def _told(endpoint: Endpoint, timeout_s: float) -> Iterator[None]:
    """The client's errors as ours: RequestFailed for the request's own sake, ServingError where the server is gone."""
    try:
        yield
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
        raise ServingError(
            f"{endpoint.url} refuses: {_short(e)}", "Check the key, the address and serving.served_model."
        ) from None
    except openai.APIStatusError as e:
        endpoint.check()
        raise RequestFailed(f"{endpoint.url} answered {e.status_code}: {_short(e)}") from None
    except openai.APITimeoutError:
        endpoint.check()
        raise RequestFailed(f"{endpoint.url} gave no answer in {timeout_s:g} s, {RETRIES + 1} times") from None
    except openai.APIConnectionError as e:
        endpoint.check()
        raise ServingError(
            f"{endpoint.url} can't be reached: {e.__cause__ or e}",
            "What is finished is kept; run the same command again.",
        ) from None


def _short(error: openai.APIStatusError) -> str:
    return " ".join(str(error.message).split())[:300]
