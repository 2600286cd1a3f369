"""Appends of one session that are under way, so that the next may be sent, and be made ready, before one is durable."""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any

from kvstore_server.errors import DeadlineExceeded


class Arrival:
    """An append [start, end) that is being received or committed."""

    def __init__(self, start: int, end: int) -> None:
        loop = asyncio.get_running_loop()
        self.start, self.end = start, end
        self.received: asyncio.Future[str | None] = loop.create_future()
        """The digest once all of it is here; None if that will never be."""
        self.settled: asyncio.Future[None] = loop.create_future()
        """Done once it is durable or has failed."""

    def settle(self) -> None:
        """It is durable, or has failed; once is enough."""
        for each in (self.received, self.settled):
            if not each.done():
                each.set_result(None)


class Arrivals:
    """Only the event loop calls it."""

    def __init__(self) -> None:
        self._under_way: list[Arrival] = []

    def enter(self, start: int, end: int) -> Arrival:
        """An append is under way until it leaves."""
        self._under_way.append(own := Arrival(start, end))
        return own

    def leave(self, own: Arrival) -> None:
        """Settles it too."""
        self._under_way.remove(own)
        own.settle()

    def reach(self, start: int) -> bool:
        """Whether an append that ends at `start` is under way."""
        return any(each.end == start for each in self._under_way)

    def before(self, start: int) -> Arrival | None:
        """The one that ends at `start` and is not settled; None if there are several, of which one at most can win."""
        found = [each for each in self._under_way if each.end == start]
        return found[0] if len(found) == 1 and not found[0].settled.done() else None

    async def wait(self, start: int, deadline: float) -> None:
        """Returns when all that end at `start` are settled; DeadlineExceeded after `deadline`."""
        await bounded([each.settled for each in self._under_way if each.end == start], start, deadline)


async def bounded(futures: Sequence[asyncio.Future[Any]], start: int, deadline: float) -> None:
    """Waits for all of them, which an append at `start` needs."""
    if futures and (await asyncio.wait(futures, timeout=max(0.0, deadline - monotonic())))[1]:
        raise DeadlineExceeded("DEADLINE", f"the append that ends at {start} took too long")
