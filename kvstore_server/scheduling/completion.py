"""Results that the device has still to finish: waited for on a thread of their own, while the next work is launched."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)
AHEAD_MAX = 2
"""Runs that may be unfinished while another is launched: more would only keep queries from being run together."""


@dataclass(frozen=True)
class Later(Generic[T_co]):
    """What `wait()` returns once the device has it; it blocks, without holding up other threads."""

    wait: Callable[[], T_co]


def deliver(waiting: Sequence[Future[Any]], results: Sequence[Any]) -> None:
    for done, result in zip(waiting, results, strict=True):
        done.set_result(result)


class Completions:
    """Waits for runs in the order in which they were launched and hands each its results, or `failed` its error."""

    def __init__(self, failed: Callable[[list[Future[Any]], BaseException], None]) -> None:
        self._failed = failed
        self._under_way: deque[tuple[list[Future[Any]], Later[Sequence[Any]]]] = deque()
        self._changed = threading.Condition()
        self._open = True
        self._thread = threading.Thread(target=self._loop, name="kvstore-completion", daemon=True)
        self._thread.start()

    def add(self, waiting: list[Future[Any]], results: Later[Sequence[Any]]) -> None:
        with self._changed:
            self._under_way.append((waiting, results))
            self._changed.notify_all()

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
            try:
                deliver(waiting, results.wait())
            except BaseException as error:
                self._failed(waiting, error)
            with self._changed:
                self._under_way.popleft()
                self._changed.notify_all()
