"""Appends of one session that are under way, so that the next may be sent before the last is durable."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from kvstore_server.errors import DeadlineExceeded


class Arrivals:
    """Where each append that is being received or committed will end. Only the event loop calls it."""

    def __init__(self) -> None:
        self._under_way: list[tuple[int, asyncio.Future[None]]] = []

    @contextmanager
    def until(self, end: int) -> Iterator[None]:
        """While an append is under way that ends at `end`."""
        own = end, asyncio.get_running_loop().create_future()
        self._under_way.append(own)
        try:
            yield
        finally:
            self._under_way.remove(own)
            own[1].set_result(None)

    def reach(self, start: int) -> bool:
        """Whether an append that ends at `start` is under way."""
        return any(end == start for end, _ in self._under_way)

    async def wait(self, start: int, deadline: float) -> None:
        """Returns when no append that ends at `start` is under way; DeadlineExceeded after `deadline`."""
        before = [done for end, done in self._under_way if end == start]
        if before and (await asyncio.wait(before, timeout=max(0.0, deadline - monotonic())))[1]:
            raise DeadlineExceeded("DEADLINE", f"the append that ends at {start} took too long")
