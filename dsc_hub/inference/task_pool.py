"""Limited number of concurrent jobs: keeps chains and requests in flight, and handles Ctrl-C.

First Ctrl-C: no new job starts, jobs in flight are finished and stored. Second Ctrl-C: everything stops at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

from dsc_hub.system.progress import say

OPEN = 4  # started jobs, as a multiple of the limit: those above the limit wait aside
TICK_S = 0.5  # interval in seconds at which a limit that has risen is noticed


class Stopped(Exception):
    """The user pressed Ctrl-C: no new request is sent."""


_of_this_job: ContextVar[TaskPool] = ContextVar("flow")


def raise_if_stopped() -> None:
    """Raise Stopped if this is a job of a pool and the user pressed Ctrl-C. Called before each request."""
    if (pool := _of_this_job.get(None)) is not None and pool.stopping:
        raise Stopped


@contextlib.asynccontextmanager
async def aside() -> AsyncIterator[None]:
    """Give the place of the current job to others while the block waits; nothing outside of a pool's jobs."""
    pool = _of_this_job.get(None)
    async with pool.aside() if pool is not None else contextlib.nullcontext():
        yield


class TaskPool:
    """Run jobs, at most `most()` at once.

    A job that waits for something other than the server stands `aside` meanwhile, and another job takes its place, so
    that the server stays busy.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        self._most = most
        self._busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()  # jobs that stood aside and wait for a place
        self._wake = asyncio.Event()
        self.stopping = False

    async def over(self, jobs: Iterable[Callable[[], Coroutine[Any, Any, Any]] | None]) -> AsyncGenerator[Any]:
        """Run the jobs and yield their results as they finish; the first error ends all of them.

        A job that is None means that there is none now: the next one is asked for when another has finished.

        KeyboardInterrupt after Ctrl-C, once the jobs in flight are finished (pressed once) or cancelled (pressed
        twice).
        """
        pending, running = iter(jobs), set[asyncio.Task[Any]]()
        done: deque[asyncio.Task[Any]] = deque()

        def finished(task: asyncio.Task[Any]) -> None:
            running.discard(task)
            done.append(task)
            self._leave()

        ticker, job_context = asyncio.create_task(self._tick()), copy_context()
        job_context.run(_of_this_job.set, self)
        gc.collect()  # garbage that is frozen is never collected: a process of many pools grew by 0.8 MiB with each
        gc.freeze()  # the libraries' objects are no garbage, and scanning them repeatedly costs a sixth of the time
        try:
            with self._ctrl_c():
                while True:
                    while self._has_room(len(running)) and (job := next(pending, None)) is not None:
                        self._busy += 1
                        task = asyncio.get_running_loop().create_task(job(), context=job_context)
                        running.add(task)
                        task.add_done_callback(finished)
                    if not running and not done:
                        break
                    await self._wake.wait()
                    self._wake.clear()
                    while done:
                        try:
                            yield done.popleft().result()
                        except Stopped:
                            continue
        finally:
            ticker.cancel()
            for task in running:
                task.cancel()
            # `done` too: several may have failed at the same moment, and each error must be retrieved.
            await asyncio.gather(ticker, *running, *done, return_exceptions=True)
            gc.unfreeze()
        if self.stopping:
            raise KeyboardInterrupt

    @contextlib.asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Give the job's place to others while the block waits."""
        self._leave()
        try:
            yield
        finally:
            if self._busy >= self._most() or self._waiting:
                place = asyncio.get_running_loop().create_future()
                self._waiting.append(place)
                self._let_in()
                await place
            else:
                self._busy += 1

    def _has_room(self, begun: int) -> bool:
        most = self._most()
        return not self.stopping and not self._waiting and self._busy < most and begun < OPEN * most

    def _leave(self) -> None:
        self._busy -= 1
        self._let_in()
        self._wake.set()

    def _let_in(self) -> None:
        while self._waiting and self._busy < self._most():
            place = self._waiting.popleft()
            if not place.done():
                self._busy += 1
                place.set_result(None)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._let_in()
            self._wake.set()

    @contextlib.contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        # Only the main thread receives signals; a signal that is ignored (background job) stays ignored.
        if (
            threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        ):
            yield
            return

        def on_interrupt() -> None:
            if self.stopping and task is not None:
                task.cancel()
                return
            self.stopping = True
            self._wake.set()
            say(f"finishing the {self._busy} requests in flight; Ctrl-C again stops at once (they would be lost)")

        previous_handler = signal.getsignal(signal.SIGINT)
        loop.add_signal_handler(signal.SIGINT, on_interrupt)
        try:
            yield
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            raise KeyboardInterrupt from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, previous_handler)
