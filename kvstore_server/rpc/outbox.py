"""What one client of a stream is still to be sent, written by whoever has it: no task waits to be woken for it."""

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from time import monotonic
from typing import Any

from google.protobuf.message import Message


class Outbox:
    """Messages in their order, each holding a place of so many bytes until the client has taken it, if it holds one.

    One that finds none before it is on its way when `put` returns. A write that fails or is refused by `check`
    ends everything: `ended` has what it failed with. So it has `too_slow()` when a client has not taken a message
    within `seconds`.
    """

    def __init__(
        self,
        write: Callable[[Message | bytes], Awaitable[None]],
        check: Callable[[], None],
        seconds: float,
        too_slow: Callable[[], Exception],
    ) -> None:
        self._write, self._check, self._seconds, self._too_slow = write, check, seconds, too_slow
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Message | bytes, int | None]] = deque()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._writing = False
        self._writer: asyncio.Task[None] | None = None
        self._begun = 0.0
        """When the write that is under way, or will be next, began."""
        self._watch: asyncio.TimerHandle | None = None
        self.taken: Callable[[int | None], None] = lambda _: None
        """Called for each message, with its bytes, once nothing is held of it."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: Message | bytes, size: int | None = None) -> None:
        self._waiting.append((message, size))
        if not self._writing and not self.ended.done():
            self._writing, self._begun = True, monotonic()  # a task that is not eager begins after this turn
            self._writer = _begun(self._loop, self._write_all())

    async def flush(self) -> None:
        """Returns when the client has taken everything, or never will."""
        while self._writing and self._writer is not None and not self.ended.done():
            await asyncio.wait({self.ended, self._writer}, return_when=asyncio.FIRST_COMPLETED)

    def close(self) -> None:
        """Drops what was not written."""
        for each in (self._watch, self._writer):
            if each is not None:
                each.cancel()
        if not self.ended.cancel() and not self.ended.cancelled():
            self.ended.exception()  # counts as seen
        while self._waiting:
            self.taken(self._waiting.popleft()[1])

    async def _write_all(self) -> None:
        size = None
        try:
            while self._waiting:
                message, size = self._waiting.popleft()
                self._check()
                self._begun = monotonic()
                if self._watch is None:
                    self._watch = self._loop.call_later(self._seconds, self._look)
                await self._write(message)
                self.taken(size)
                size = None
        except Exception as error:
            self._end(error)
        except asyncio.CancelledError:
            self.ended.cancel()
            raise
        finally:
            self._writing = False
            if size is not None:
                self.taken(size)

    def _look(self) -> None:
        """One timer for all writes: most are over long before it could end them."""
        left = self._begun + self._seconds - monotonic()
        self._watch = self._loop.call_later(max(left, 0.001), self._look) if self._writing and left > 0 else None
        if self._writing and left <= 0 and self._writer is not None:
            self._end(self._too_slow())
            self._writer.cancel()

    def _end(self, error: Exception) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


def _begun(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that has come to its first wait already, where Python can do that."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)
