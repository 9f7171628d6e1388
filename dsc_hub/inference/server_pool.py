"""Which server takes a request, and what becomes of one that is gone.

All requests that begin alike (system message and prompt) prefer the same server, by a hash, so that its prefix cache serves them;
when it has enough to do they go to the least busy one. A server that is gone is started again, or looked for, while its requests
go to the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from dsc_hub.errors import ServingError
from dsc_hub.inference.concurrency import Level
from dsc_hub.inference.servers import Endpoint
from dsc_hub.system.progress import say

Concurrency = int | Literal["auto"]
T = TypeVar("T")
REVIVALS = 4  # tries to start a server of our own again
LOOKS = 20  # tries to find a server of others again: some ten minutes, as it may have to load its model
WAIT_S, LONGEST_S = 0.5, 30.0  # before something is tried again, longer each time; with jitter


class Gone(Exception):
    """The server is gone with the request."""


@dataclass(eq=False)
class Lane:
    """A server, one `of` several. `busy`: requests that it has now; `looking`: whether it is still there; `revival`: it is not, and is
    being brought back; `gone`: why it was given up."""

    of: Lanes
    endpoint: Endpoint
    level: Level
    proxy: str | None = None
    busy: int = 0
    looking: asyncio.Task[str | None] | None = None
    revival: asyncio.Task[None] | None = None
    gone: ServingError | None = None  # for good

    @property
    def is_up(self) -> bool:
        return self.revival is None and self.gone is None

    @property
    def has_room(self) -> bool:
        return self.is_up and self.busy < self.level.now


@dataclass(eq=False)
class _Waiter:
    beginning: str
    avoid: Lane | None
    place: asyncio.Future[Lane]


@dataclass(eq=False)
class Lanes:
    """Servers of the same model. `concurrency`: requests at each, or a tuple with one for each. `retries` is the generator's counter,
    which gets "server back"; `answered` counts the requests that were done."""

    endpoints: Sequence[Endpoint]
    concurrency: Concurrency | tuple[Concurrency, ...]
    retries: Counter[str]
    answered: int = 0
    all: list[Lane] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        each = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * len(self.endpoints)
        self.all = [Lane(self, e, Level(n), _proxy_of(e.url)) for e, n in zip(self.endpoints, each, strict=True)]
        self._waiting: list[_Waiter] = []
        # Looking at a server that says nothing takes long: not in the threads that look up names for all the others.
        self._threads = ThreadPoolExecutor(max(1, len(self.all)), "servers")

    def level(self) -> int:
        """How many requests they should have now, all together."""
        return sum(lane.level.now for lane in self.all if lane.is_up)

    async def take(self, beginning: str, avoid: Lane | None = None) -> Lane:
        """A place at a server; `give` it back. Waits while all have enough to do or none is up; ServingError if none will be.

        The same beginning prefers the same server: nothing needs to be remembered of any chain. One to `avoid` is taken only
        where no other is up.
        """
        waiter = _Waiter(beginning, avoid, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._let_in()
        try:
            return await waiter.place
        except asyncio.CancelledError:
            if waiter.place.done() and not waiter.place.cancelled():
                self.give(waiter.place.result())
            raise

    def give(self, lane: Lane) -> None:
        """Give a place back."""
        lane.busy -= 1
        self._let_in()

    def _let_in(self) -> None:
        """Places for those who wait, in the order in which they came."""
        left: list[_Waiter] = []
        for n, waiter in enumerate(self._waiting):
            if waiter.place.done():  # cancelled
                continue
            if gone := self._all_gone():
                waiter.place.set_exception(gone)
            elif lane := self._choose(waiter):
                lane.busy += 1
                waiter.place.set_result(lane)
            else:
                left.append(waiter)
                if not any(lane.has_room for lane in self.all):
                    left += self._waiting[n + 1 :]
                    break
        self._waiting = left

    def _choose(self, waiter: _Waiter) -> Lane | None:
        up = [lane for lane in self.all if lane.is_up]
        up = [lane for lane in up if lane is not waiter.avoid] or up
        free = [lane for lane in up if lane.has_room]
        if len(up) < 2 or not free:
            return free[0] if free else None
        first = max(up, key=lambda lane: _hash(lane.endpoint.url, waiter.beginning))  # rendezvous hashing
        return first if first.has_room else min(free, key=lambda lane: lane.busy / lane.level.now)

    def _all_gone(self) -> ServingError | None:
        return self.all[-1].gone if all(lane.gone for lane in self.all) else None

    async def look(self, lane: Lane) -> None:
        """Called when a request got no answer, or one that a proxy may have given. Raises Gone if the server is gone, too; then it is
        brought back, if it can be."""
        if lane.is_up:
            if lane.looking is None:  # one look for all that broke off together
                lane.looking = asyncio.ensure_future(self._look(lane))
            if (why := await asyncio.shield(lane.looking)) is None:
                return
            if lane.is_up:
                lane.revival = asyncio.create_task(self._revive(lane, why))
        raise Gone(f"{lane.endpoint.url} is gone")

    async def _look(self, lane: Lane) -> str | None:
        """Why it is gone; None if it is there."""
        try:
            await self._in_thread(lane.endpoint.check)
        except (ServingError, OSError) as e:
            return _told(e)
        finally:
            lane.looking = None
        return None

    def give_up(self, lane: Lane, error: ServingError) -> None:
        """This server won't be asked again; `take` raises the error when there is no other."""
        lane.gone = error
        self._let_in()
        if self._all_gone() is None:
            say(f"{error.message}\n  it is not asked any more; its requests go to the others")

    async def _revive(self, lane: Lane, why: str) -> None:
        """Wait for a server that is gone, or start it again, until it is up or given up."""
        try:
            error = await self._revived(lane, why)
        except Exception as e:  # a full disk under the log: nobody waits for this task, so the requests must be told
            error = ServingError(f"{lane.endpoint.url} could not be brought back: {type(e).__name__}: {e}")
        finally:
            lane.revival = None
        if error:
            self.give_up(lane, error)
        else:
            self._let_in()

    async def _revived(self, lane: Lane, why: str) -> ServingError | None:
        """None when it is back, else why not."""
        others = any(other.is_up for other in self.all)
        say(f"{why}\n  {'its requests go to the others; ' if others else ''}trying to bring it back")
        tries = REVIVALS if lane.endpoint.restart else LOOKS
        for n in range(tries):
            await asyncio.sleep(min(LONGEST_S, 2 * WAIT_S * 4**n) * random.uniform(0.75, 1.25))
            try:
                await self._bring_back(lane.endpoint)
            except (ServingError, OSError) as e:
                why = _told(e)
            else:
                say(f"{lane.endpoint.url} is back")
                self.retries["server back"] += 1
                return None
        return ServingError(
            f"{lane.endpoint.url} did not come back in {tries} tries: {why}",
            "What is finished is kept; run the same command again when it can be reached.",
        )

    async def _bring_back(self, endpoint: Endpoint) -> None:
        """Start a server of our own again, or look whether another's is there. ServingError if it is not."""
        if endpoint.restart is None:
            await self._in_thread(endpoint.check)
            return
        await self._in_thread(endpoint.restart)
        while not await self._in_thread(endpoint.is_ready):
            await asyncio.sleep(0.25)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End what is under way; a server that is being started is waited for, so that it can be ended."""
        for lane in self.all:
            if lane.revival:
                lane.revival.cancel()
        self._threads.shutdown(cancel_futures=True)


def _told(error: ServingError | OSError) -> str:
    return error.message if isinstance(error, ServingError) else str(error)


def _hash(url: str, beginning: str) -> bytes:
    return hashlib.blake2b(f"{url} {beginning}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)
