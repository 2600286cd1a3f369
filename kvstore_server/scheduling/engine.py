"""The one device thread: queries first, encoding between them, nothing that has missed its deadline."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeVar

from kvstore_server.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from kvstore_server.scheduling.completion import Completions, Later, deliver

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
Lane = Literal["query", "encode"]
RETRY_AFTER_SECONDS = 0.05
TOGETHER_MAX = 64
"""Pieces of work that one run takes: its scratch memory grows with them."""


@dataclass(frozen=True)
class Work:
    item: Any
    run: Callable[[list[Any]], Sequence[Any] | Later[Sequence[Any]]]
    """Results of several items, in their order."""
    key: Hashable
    """Waiting work of one key is run together; None stands alone."""
    deadline: float
    """On time.monotonic()'s clock."""
    done: Future[Any]


class Engine:
    """Runs work on one thread, so that ops never compete for the device and page writes have an order.

    The two lanes alternate when both wait: a long append delays a query by at most one piece of encoding, and a flood
    of queries cannot starve appends. At most `waiting_max` pieces wait in a lane; more are refused. Queries of one key
    that wait at the same time are run together; nothing ever waits for others to come.

    An error for which `is_fatal` holds means that the device is lost: it and all work after it answer Unavailable, and
    `on_fatal` is called once, on a thread of the engine.
    """

    def __init__(
        self,
        waiting_max: int,
        is_fatal: Callable[[BaseException], bool] = lambda _: False,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self._waiting_max = waiting_max
        self._is_fatal, self._on_fatal = is_fatal, on_fatal
        self._lanes: dict[Lane, deque[Work]] = {"query": deque(), "encode": deque()}
        self._wake = threading.Condition()
        self._open = True
        self.runs = 0
        self.run_items = 0
        self._completions = Completions(self._failed)
        self._thread = threading.Thread(target=self._loop, name="kvstore-device", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T | Later[T]], deadline: float, lane: Lane = "query") -> T:
        """The result of `work()` run on the device thread; DeadlineExceeded if its turn comes after `deadline`.

        Raises ResourceExhausted when the lane is full and Unavailable when the engine is closed. Cancelling the caller
        drops work that has not begun.
        """

        def alone(_: list[None]) -> Sequence[T] | Later[Sequence[T]]:
            result = work()
            return Later(lambda: [result.wait()]) if isinstance(result, Later) else [result]

        return await self._add(lane, Work(None, alone, None, deadline, Future()))

    async def run_together(
        self, key: Hashable, item: I, work: Callable[[list[I]], Sequence[T] | Later[Sequence[T]]], deadline: float
    ) -> T:
        """`item`'s part of `work(items)`, whose items are those of this key that wait when the device is free.

        `work` may return what the device has still to finish; it must be the same function for equal keys. Otherwise
        as `run`.
        """
        return await self._add("query", Work(item, work, key, deadline, Future()))

    @property
    def waiting(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def close(self, timeout_seconds: float) -> None:
        """Finishes what waits, then ends the thread; work left after the timeout answers Unavailable."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join(timeout_seconds)
        self._refuse_waiting(Unavailable("DRAINING", "the device engine was closed"))
        self._completions.close(timeout_seconds)

    async def _add(self, lane: Lane, work: Work) -> Any:
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
            self._lanes[lane].append(work)
            self._wake.notify()
        return await asyncio.wrap_future(work.done)

    def _loop(self) -> None:
        last: Lane = "encode"
        while True:
            self._completions.await_room()
            with self._wake:
                while self._open and not self.waiting:
                    self._wake.wait()
                if not self.waiting:
                    return
                other: Lane = "query" if last == "encode" else "encode"
                last = other if self._lanes[other] else last
                taken = self._take(self._lanes[last])
            self._run(taken)

    @staticmethod
    def _take(lane: deque[Work]) -> list[Work]:
        """The work whose turn it is, with what may be run together with it."""
        taken = [lane.popleft()]
        if (key := taken[0].key) is not None:
            taken += [work for work in lane if work.key == key][: TOGETHER_MAX - 1]
            chosen = set(map(id, taken))
            kept = [work for work in lane if id(work) not in chosen]
            lane.clear()
            lane.extend(kept)
        return taken

    def _run(self, taken: list[Work]) -> None:
        now, due = monotonic(), list[Work]()
        for work in taken:
            if not work.done.set_running_or_notify_cancel():
                continue
            if now > work.deadline:
                late = DeadlineExceeded("DEADLINE", "the deadline passed before the device was free")
                work.done.set_exception(late)
            else:
                due.append(work)
        if not due:
            return
        self.runs += 1
        self.run_items += len(due)
        waiting = [work.done for work in due]
        try:
            results = due[0].run([work.item for work in due])
        except BaseException as error:
            self._failed(waiting, error)
            return
        if isinstance(results, Later):
            self._completions.add(waiting, results)
        else:
            deliver(waiting, results)

    def _failed(self, waiting: list[Future[Any]], error: BaseException) -> None:
        """Answers work that raised; a lost device ends everything."""
        if self._is_fatal(error):
            lost = Unavailable("DEVICE_LOST", "the device failed; the server is ending")
            with self._wake:
                first, self._open = self._open, False
            self._refuse_waiting(lost)
            if first:
                self._on_fatal(error)
            error = lost
        for done in waiting:
            done.set_exception(error)

    def _refuse_waiting(self, error: Unavailable) -> None:
        with self._wake:
            for lane in self._lanes.values():
                while lane:
                    work = lane.popleft()
                    if work.done.set_running_or_notify_cancel():
                        work.done.set_exception(error)
