"""Results on their way back: from the device, and from the engine's threads to the event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
AHEAD_MAX = 2
"""Runs that may be unfinished while another is launched: more would only keep queries from being run together."""


@dataclass(frozen=True)
class Later(Generic[T_co]):
    """What `wait()` returns once the device has it; it blocks, without holding up other threads."""

    wait: Callable[[], T_co]
    ready: Callable[[], bool] = lambda: False
    """Whether the device has it, where that can be asked."""


@dataclass(frozen=True)
class Outcome:
    """What a caller on an event loop waits for."""

    done: "asyncio.Future[Any]"
    result: Any = None
    error: BaseException | None = None


def settle(outcomes: Sequence[Outcome]) -> None:
    """Answers callers from any thread, those of another's event loop by one call into it."""
    here = asyncio._get_running_loop()  # None, rather than an error, where none runs
    loops = {outcome.done.get_loop() for outcome in outcomes}
    for loop in loops:
        own = [outcome for outcome in outcomes if outcome.done.get_loop() is loop]
        if loop is here:
            _set(own)
            continue
        with suppress(RuntimeError):  # a closed loop has nobody waiting
            loop.call_soon_threadsafe(_set, own)


def _set(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.done.done():
            continue
        if outcome.error is None:
            outcome.done.set_result(outcome.result)
        else:
            outcome.done.set_exception(outcome.error)


def settle_all(waiting: "Sequence[asyncio.Future[Any]]", results: Sequence[Any]) -> None:
    settle([Outcome(done, result) for done, result in zip(waiting, results, strict=True)])


class Completions:
    """Has `finish(callers, results)`, which waits for the device, called for runs in the order of their launch."""

    def __init__(self, finish: Callable[["list[asyncio.Future[Any]]", Later[Sequence[Any]]], None]) -> None:
        self._finish = finish
        self._under_way: deque[tuple[list[asyncio.Future[Any]], Later[Sequence[Any]]]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="kvstore-completion", daemon=True)
        self._thread.start()

    def add(self, waiting: "list[asyncio.Future[Any]]", results: Later[Sequence[Any]]) -> None:
        with self._changed:
            self._under_way.append((waiting, results))
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def await_room(self) -> None:
        """Returns when fewer than `AHEAD_MAX` runs are unfinished."""
        with self._changed:
            while len(self._under_way) >= AHEAD_MAX:
                self._changed.wait()

    def close(self, timeout_seconds: float) -> None:
        """Ends the thread when what is under way has been delivered."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _loop(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._under_way:
                    self._changed.wait()
                if not self._under_way:
                    return
                waiting, results = self._under_way[0]
            self._finish(waiting, results)
            with self._changed:
                self._under_way.popleft()
                self._changed.notify_all()
