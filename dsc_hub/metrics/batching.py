"""Scoring during sampling: texts are collected into batches and scored in a thread in parallel with the generation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

BatchResult = TypeVar("BatchResult")

MOST_AT_ONCE = 256


class BatchScorer(Generic[BatchResult]):
    """Batches single scoring requests: `await scoring(text, beside)` returns the text's score.

    `scorer` takes a list of texts and an equally long list of what each is scored with (the prompt; for a veto the
    first answer). Texts that arrive while a batch is being scored form the next batch.
    """

    def __init__(self, scorer: Callable[[Sequence[str], Sequence[Any]], list[BatchResult]]) -> None:
        self._scorer = scorer
        self._waiting: list[tuple[str, Any, asyncio.Future[BatchResult]]] = []
        self._worker: asyncio.Task[None] | None = None
        # One thread: scorers (tokenizers, evaluate's buffers) are not guaranteed to be thread-safe.
        self._thread = ThreadPoolExecutor(1, "scoring")
        self.seconds = 0.0  # total time spent in the scorer, without the batch at work
        self._began: float | None = None  # of that batch

    def busy_seconds(self) -> float:
        """Return the seconds that the scorer has worked so far, the batch at work included."""
        return self.seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    async def __call__(self, text: str, beside: Any) -> BatchResult:
        future: asyncio.Future[BatchResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, beside, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST_AT_ONCE], self._waiting[MOST_AT_ONCE:]
            started = self._began = time.monotonic()
            try:
                texts, besides, _ = (list(part) for part in zip(*batch, strict=True))
                scores = await loop.run_in_executor(self._thread, self._scorer, texts, besides)
                if len(scores) != len(batch):
                    raise RuntimeError(f"the scorer gave {len(scores)} scores for {len(batch)} texts")
            except BaseException as e:
                for *_, future in batch:  # every waiting caller gets the error: nothing hangs, no error is lost
                    if not future.done():
                        future.set_exception(e)
                if not isinstance(e, Exception):
                    raise
                continue
            finally:
                self.seconds += time.monotonic() - started
                self._began = None
            for (*_, future), score in zip(batch, scores, strict=True):
                if not future.done():
                    future.set_result(score)
