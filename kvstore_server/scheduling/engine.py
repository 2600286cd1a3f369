"""The one device thread: queries first, encoding between them, nothing that has missed its deadline."""

import asyncio
import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, TypeVar

from kvstore_server.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from kvstore_server.scheduling.completion import AHEAD_MAX, Completions, Later, Promise, Run, refuse, settle
from kvstore_server.scheduling.fair_lane import FairLane

T = TypeVar("T")
I = TypeVar("I")  # noqa: E741
Lane = Literal["query", "encode"]
RETRY_AFTER_SECONDS = 0.05
TOGETHER_MAX = 64
"""Pieces of work that one run takes: its scratch memory grows with them."""
AT_ONCE_MAX = 8
"""Runs that event loops have begun and that are unfinished."""
STAY_SECONDS = 0.0001
"""How long a loop looks for a run's end without doing anything else, if nobody waits for another."""
LOOK_SECONDS = 0.002
"""How long it looks whenever it has nothing else to do; from then on every so often."""
LOOK_AGAIN_SECONDS = 0.0002


@dataclass(slots=True)
class Work:
    tenant: str
    item: Any
    run: Callable[[list[Any]], Sequence[Any] | Later[Sequence[Any]]]
    """Results of several items, in their order."""
    key: Hashable
    """Waiting work of one key is run together; None stands alone."""
    deadline: float
    """On time.monotonic()'s clock."""
    done: Promise
    queued_at: float
    at_once: "Callable[[list[Any]], Later[Sequence[Any]] | None] | None" = None
    """As `run`, if no more than a launch is needed; None otherwise."""


class Engine:
    """Runs work on one thread, so that ops never compete for the device and page writes have an order.

    The two lanes alternate when both wait: a long append delays a query by at most one piece of encoding, and a flood
    of queries cannot starve appends. Within a lane tenants take turns by their weights (fair_lane.py). At most
    `waiting_max` pieces wait in a lane; more are refused. Queries of one key, which are of one tenant, that wait at the
    same time are run together; nothing ever waits for others to come.

    Where the device only has to be told to repeat what it has done before, an event loop does that itself while the
    device thread launches nothing, and looks for the result between its other work: waking a thread and being woken by
    it would take longer than the launch.

    An error for which `is_fatal` holds means that the device is lost: it and all work after it answer Unavailable, and
    `on_fatal` is called once, on a thread of the engine. `ran` hears of every run, also there: its lane, the seconds
    that its pieces had waited, and its own until the device was done. All work runs within `ordered()`. A run during
    which `setups()` grows did what the next of its like finds done, and says nothing of how long that one will take.
    """

    def __init__(
        self,
        waiting_max: int,
        is_fatal: Callable[[BaseException], bool] = lambda _: False,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        ran: Callable[[Lane, list[float], float], None] = lambda *_: None,
        ordered: Callable[[], AbstractContextManager[object]] = nullcontext,
        weight_of: Callable[[str], int] = lambda _: 1,
        setups: Callable[[], int] = lambda: 0,
    ) -> None:
        self._waiting_max, self._setups = waiting_max, setups
        self._is_fatal, self._on_fatal, self._ran = is_fatal, on_fatal, ran
        self._lanes: dict[Lane, FairLane[Work]] = {"query": FairLane(weight_of), "encode": FairLane(weight_of)}
        self._wake = threading.Condition()
        self._launching = threading.Lock()
        """Held by whoever gives the device work."""
        self._at_once = list[Hashable]()
        """Keys of the unfinished runs that event loops began."""
        self._open = True
        self.runs = 0
        self.run_items = 0
        self._completions = Completions(self._finish)
        self._thread = threading.Thread(target=self._serve, args=(ordered,), name="kvstore-device", daemon=True)
        self._thread.start()

    async def run(self, work: Callable[[], T | Later[T]], deadline: float, lane: Lane = "query", tenant: str = "") -> T:
        """The result of `work()` run on the device thread; DeadlineExceeded if its turn comes after `deadline`.

        Raises ResourceExhausted when the lane is full and Unavailable when the engine is closed. Cancelling the caller
        drops work that has not begun.
        """

        def alone(_: list[None]) -> Sequence[T] | Later[Sequence[T]]:
            result = work()
            return Later(lambda: [result.wait()]) if isinstance(result, Later) else [result]

        done = asyncio.get_running_loop().create_future()
        self._add(lane, Work(tenant, None, alone, None, deadline, done, monotonic()))
        return await done

    def run_together(
        self,
        key: Hashable,
        item: I,
        work: Callable[[list[I]], Sequence[T] | Later[Sequence[T]]],
        deadline: float,
        at_once: Callable[[list[I]], Later[Sequence[T]] | None] | None = None,
        tenant: str = "",
    ) -> "asyncio.Future[T]":
        """`item`'s part of `work(items)`, whose items are those of this key that wait when the device is free.

        `work` may return what the device has still to finish; it must be the same function for equal keys. `at_once`
        is called on the caller's event loop and answers None where `work` has to be called after all. Otherwise as
        `run`, except that a full lane is refused at once and no task is needed to wait.
        """
        done = asyncio.get_running_loop().create_future()
        self.tell_together(Work(tenant, item, work, key, deadline, done, monotonic(), at_once))
        return done

    def tell_together(self, work: Work) -> None:
        """As run_together: `work.done` is told."""
        self._add("query", work)

    @property
    def waiting(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def wait_seconds(self, tenant: str, before: int, enough: float) -> float:
        """How long a query would probably wait for its turn, with so many of its tenant's before it.

        More than that is said if it is not more than `enough`: it costs nothing to know.
        """
        lane = self._lanes["query"]
        if (most := lane.wait_seconds_max(tenant, before)) <= enough:
            return most
        with self._wake:
            return lane.wait_seconds(tenant, before)

    def close(self, timeout_seconds: float) -> None:
        """Finishes what waits, then ends the thread; work left after the timeout answers Unavailable."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join(timeout_seconds)
        self._refuse_waiting(Unavailable("DRAINING", "the device engine was closed"))
        self._completions.close(timeout_seconds)

    def _add(self, lane: Lane, work: Work) -> None:
        at_once = work.at_once
        if at_once is not None and not self._lanes[lane] and self._open and self._begin([work]):
            return
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
            self._lanes[lane].add(work)
            if at_once is None or not self._at_once:
                self._wake.notify()

    def _serve(self, ordered: Callable[[], AbstractContextManager[object]]) -> None:
        with ordered():
            self._loop()

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
                taken = self._lanes[last].take(TOGETHER_MAX)
            self._run(last, taken)

    @staticmethod
    def _due(taken: list[Work], now: float) -> list[Work]:
        """What is still wanted; the late are told."""
        if late := [work.done for work in taken if now > work.deadline]:
            error = DeadlineExceeded("DEADLINE", "the deadline passed before the device was free")
            refuse(late, error)
        return [work for work in taken if not work.done.cancelled() and now <= work.deadline]

    def _run(self, lane: Lane, taken: list[Work]) -> None:
        now = monotonic()
        due = self._due(taken, now)
        if not due:
            return
        waiting = [work.done for work in due]
        queued = [now - work.queued_at for work in due]
        try:
            with self._launching:
                self._count(due)
                setups = self._setups()
                results = due[0].run([work.item for work in due])
                usual = self._setups() == setups
        except BaseException as error:
            self._failed(waiting, error)
            return
        if not isinstance(results, Later):
            seconds = monotonic() - now
            self._charge(lane, due[0].tenant, len(due), seconds, usual)
            self._ran(lane, queued, seconds)
            settle(waiting, results)
            return
        run = Run(lane, due[0].tenant, waiting, queued, now, results, usual)
        if self.waiting or self._completions.busy:
            self._completions.add(run)
        else:  # nothing else to launch: another thread would only cost a switch
            self._finish(run)

    def _count(self, due: list[Work]) -> None:
        self.runs += 1
        self.run_items += len(due)

    def _begin(self, due: list[Work]) -> bool:
        """Launches work of one key from its event loop; False, if that takes more than a launch or somebody else's is
        under way."""
        key, at_once, now = due[0].key, due[0].at_once, monotonic()
        full = self._at_once.count(key) >= AHEAD_MAX or len(self._at_once) >= AT_ONCE_MAX
        if at_once is None or full or not self._launching.acquire(blocking=False):
            return False
        waiting = [work.done for work in due]
        try:
            results = at_once([work.item for work in due])
            if results is None:
                return False
            self._count(due)
        except BaseException as error:
            self._failed(waiting, error)
            return True
        finally:
            self._launching.release()
        self._at_once.append(key)
        run = Run("query", due[0].tenant, waiting, [now - work.queued_at for work in due], now, results)
        asyncio.get_running_loop().call_soon(self._look, run, key)
        return True

    def _look(self, run: Run, key: Hashable) -> None:
        """Answers what an event loop began, if the device has it; else looks again."""
        loop, ready = asyncio.get_running_loop(), run.results.ready
        alone = len(self._at_once) == 1 and not self._lanes["query"]
        until = run.begun + (STAY_SECONDS if alone else 0)
        try:
            while not (there := ready()) and monotonic() < until:
                pass
        except BaseException:
            there = True  # waiting raises it too
        if not there and monotonic() < run.begun + LOOK_SECONDS:
            loop.call_soon(self._look, run, key)
            return
        if not there:
            loop.call_later(LOOK_AGAIN_SECONDS, self._look, run, key)
            return
        self._at_once.remove(key)
        self._finish(run, self._begin_next)

    def _begin_next(self) -> None:
        """Launches what has come meanwhile, or has the device thread do it."""
        if not (lane := self._lanes["query"]):
            return
        with self._wake:
            if not lane:
                return
            if lane.first().at_once is None:
                self._wake.notify()
                return
            taken = lane.take(TOGETHER_MAX)
        due = self._due(taken, monotonic())
        is_begun = not due or self._begin(due)
        with self._wake:
            if not is_begun:
                lane.put_back(due)
            if lane and not self._at_once:  # nothing that was begun will end and look here again
                self._wake.notify()

    def _charge(self, lane: Lane, tenant: str, pieces: int, seconds: float, usual: bool) -> None:
        with self._wake:
            self._lanes[lane].charge(tenant, pieces, seconds, usual)

    def _finish(self, run: Run, next_one: Callable[[], None] = lambda: None) -> None:
        """Waits for the device, which may have its next work then, and answers."""
        try:
            results = run.results.wait()
        except BaseException as error:
            self._failed(run.waiting, error)
            next_one()
            return
        seconds = monotonic() - run.begun
        self._charge(run.lane, run.tenant, len(run.waiting), seconds, run.usual)
        next_one()
        settle(run.waiting, results)
        self._ran(run.lane, run.queued, seconds)

    def _failed(self, waiting: list[Promise], error: BaseException) -> None:
        """Answers work that raised; a lost device ends everything."""
        if self._is_fatal(error):
            lost = Unavailable("DEVICE_LOST", "the device failed; the server is ending")
            with self._wake:
                first, self._open = self._open, False
            self._refuse_waiting(lost)
            if first:
                self._on_fatal(error)
            error = lost
        refuse(waiting, error)

    def _refuse_waiting(self, error: Unavailable) -> None:
        with self._wake:
            refused = [work.done for lane in self._lanes.values() for work in lane.clear()]
        refuse(refused, error)
