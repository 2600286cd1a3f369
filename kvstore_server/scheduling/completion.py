"""Results on their way back: from the device, and from the engine's threads to the event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
AHEAD_MAX = 2
"""Runs that may be unfinished while another is launched: more would only keep queries from being run together."""


class Later(NamedTuple, Generic[T_co]):
    """What `wait()` returns once the device has it; it blocks, without holding up other threads."""

    wait: Callable[[], T_co]
    ready: Callable[[], bool] = lambda: False
    """Whether the device has it, where that can be asked."""


class Promise(Protocol):
    """What a caller on an event loop is answered through: an asyncio.Future, or Told."""

    def get_loop(self) -> asyncio.AbstractEventLoop: ...
    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def set_result(self, result: Any, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class Told(Generic[T]):
    """In place of a future that no task waits for: `tell(result, error)` is called in the turn that brings either."""

    __slots__ = ("_cancelled", "_loop", "_over", "_tell")

    def __init__(self, tell: Callable[[T | None, BaseException | None], None]) -> None:
        self._loop, self._tell = asyncio.get_running_loop(), tell
        self._over = self._cancelled = False

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def done(self) -> bool:
        return self._over

    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Nothing is told any more."""
        if not self._over:
            self._over = self._cancelled = True

    def set_result(self, result: T) -> None:
        self._end(result, None)

    def set_exception(self, exception: BaseException) -> None:
        self._end(None, exception)

    def _end(self, result: T | None, error: BaseException | None) -> None:
        self._over = True
        try:
            self._tell(result, error)
        except Exception as failure:  # as with a future, it is not the business of whoever brings the result
            self._loop.call_exception_handler({"message": "an answer could not be handed on", "exception": failure})


def settle(waiting: Sequence[Promise], results: Sequence[Any]) -> None:
    """Answers callers from any thread, those of another's event loop by one call into it."""
    here = asyncio._get_running_loop()  # None, rather than an error, where none runs
    elsewhere: dict[asyncio.AbstractEventLoop, list[tuple[Promise, Any]]] = {}
    for promise, result in zip(waiting, results, strict=True):
        if (loop := promise.get_loop()) is here:
            _set(promise, result)
        else:
            elsewhere.setdefault(loop, []).append((promise, result))
    for loop, outcomes in elsewhere.items():
        with suppress(RuntimeError):  # a closed loop has nobody waiting
            loop.call_soon_threadsafe(_set_all, outcomes)


def refuse(waiting: Sequence[Promise], error: BaseException) -> None:
    """Answers them all with an error."""
    settle(waiting, [Refused(error)] * len(waiting))


@dataclass(frozen=True)
class Refused:
    """In place of a result."""

    error: BaseException


def _set_all(outcomes: list[tuple[Promise, Any]]) -> None:
    for promise, result in outcomes:
        _set(promise, result)


def _set(promise: Promise, result: Any) -> None:
    if promise.done():
        return
    if isinstance(result, Refused):
        promise.set_exception(result.error)
    else:
        promise.set_result(result)


@dataclass(slots=True)
class Run:
    """Pieces of work that were launched together, and their results, which the device has still to finish."""

    lane: Any
    tenant: str
    waiting: list[Promise]
    queued: list[float]
    """Seconds that each had waited."""
    begun: float
    results: Later[Sequence[Any]]
    usual: bool = True
    """It did nothing that the next of its like will find done."""


class Completions:
    """Has `finish(run)`, which waits for the device, called for runs in the order of their launch."""

    def __init__(self, finish: Callable[[Run], None]) -> None:
        self._finish = finish
        self._under_way: deque[Run] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="kvstore-completion", daemon=True)
        self._thread.start()

    def add(self, run: Run) -> None:
        with self._changed:
            self._under_way.append(run)
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
                run = self._under_way[0]
            self._finish(run)
            with self._changed:
                self._under_way.popleft()
                self._changed.notify_all()
