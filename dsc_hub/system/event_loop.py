"""Run a coroutine to its end, in a script or in a notebook."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_coroutine(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` with `asyncio.run`; if an event loop is running already (a notebook), in a thread with its own loop.

    A KeyboardInterrupt that arrives while the thread works cancels the coroutine and is raised once it has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = []

    async def cancellable() -> T:
        running.append((asyncio.get_running_loop(), asyncio.current_task()))
        return await main

    with ThreadPoolExecutor(1, "dsc_hub") as thread:
        done = thread.submit(asyncio.run, cancellable())
        try:
            return done.result()
        except KeyboardInterrupt:
            for loop, task in running:
                if task:
                    loop.call_soon_threadsafe(task.cancel)
            raise
