"""The one device thread: queries first, encoding between them, nothing that has missed its deadline."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeVar

from kvstore_server.errors import DeadlineExceeded, ResourceExhausted, Unavailable

T = TypeVar("T")
Lane = Literal["query", "encode"]
RETRY_AFTER_SECONDS = 0.05


@dataclass(frozen=True)
class Work:
    run: Callable[[], Any]
    deadline: float
    """On time.monotonic()'s clock."""
    done: Future[Any]


class Engine:
    """Runs work on one thread, so that ops never compete for the device and page writes have an order.

    The two lanes alternate when both wait: a long append delays a query by at most one (layer, kind) of encoding, and
    a flood of queries cannot starve appends. At most `waiting_max` pieces wait in a lane; more are refused.
    """

    def __init__(self, waiting_max: int) -> None:
        self._waiting_max = waiting_max
        self._lanes: dict[Lane, deque[Work]] = {"query": deque(), "encode": deque()}
        self._wake = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="kvstore-device", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T], deadline: float, lane: Lane = "query") -> T:
        """The result of `work()` run on the device thread; DeadlineExceeded if its turn comes after `deadline`.

        Raises ResourceExhausted when the lane is full and Unavailable when the engine is closed. Cancelling the caller
        drops work that has not begun.
        """
        done: Future[Any] = Future()
        with self._wake:
            if not self._open:
                raise Unavailable("DRAINING", "the device engine is closed")
            if len(self._lanes[lane]) >= self._waiting_max:
                raise ResourceExhausted(
                    "BUSY",
                    f"{self._waiting_max} pieces of {lane} work are waiting",
                    RETRY_AFTER_SECONDS,
                    limit=self._waiting_max,
                )
            self._lanes[lane].append(Work(work, deadline, done))
            self._wake.notify()
        return await asyncio.wrap_future(done)

    @property
    def waiting(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def close(self, timeout_seconds: float) -> None:
        """Finishes what waits, then ends the thread; work left after the timeout answers Unavailable."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join(timeout_seconds)
        with self._wake:
            for lane in self._lanes.values():
                while lane:
                    lane.popleft().done.set_exception(Unavailable("DRAINING", "the device engine was closed"))

    def _loop(self) -> None:
        last: Lane = "encode"
        while True:
            with self._wake:
                while self._open and not self.waiting:
                    self._wake.wait()
                if not self.waiting:
                    return
                other: Lane = "query" if last == "encode" else "encode"
                last = other if self._lanes[other] else last
                work = self._lanes[last].popleft()
            _finish(work)


def _finish(work: Work) -> None:
    if not work.done.set_running_or_notify_cancel():
        return
    if monotonic() > work.deadline:
        work.done.set_exception(DeadlineExceeded("DEADLINE", "the deadline passed before the device was free"))
        return
    try:
        work.done.set_result(work.run())
    except BaseException as error:
        work.done.set_exception(error)
