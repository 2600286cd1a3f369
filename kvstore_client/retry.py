"""When a failed call is made again: only where that is safe and useful, within the call's own deadline.

Every call of the service is idempotent, so an unknown outcome is settled by the same call again.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvstore_client.errors import (
    CLOSED,
    Cancelled,
    DeadlineExceeded,
    KVStoreError,
    ResourceExhausted,
    Unavailable,
)

T = TypeVar("T")


class Clock(Protocol):
    """The seam to time."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


SYSTEM_CLOCK = SystemClock()


def is_retryable(error: KVStoreError) -> bool:
    """A full server is asked again only if it says when (RetryInfo). One that stops may cancel calls."""
    if isinstance(error, ResourceExhausted):
        return error.retry_after_seconds is not None
    if isinstance(error, Cancelled):
        return error.reason != CLOSED
    return isinstance(error, Unavailable | DeadlineExceeded)


@dataclass(frozen=True)
class Retry:
    """Exponential backoff within the `timeout` of each call, whatever `attempts` would still allow."""

    attempts: int | None = None
    """First attempt included; None is as many as the call's timeout allows."""
    base_delay_seconds: float = 0.05
    max_delay_seconds: float = 2.0
    factor: float = 2.0
    jitter: float = 0.5
    """Share of a delay that is random, so that clients do not come back together."""
    attempt_timeout_seconds: float | None = None
    """Deadline of one attempt; None gives each attempt all the time that is left."""

    def __post_init__(self) -> None:
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts {self.attempts} is below 1")
        if not 0 <= self.base_delay_seconds <= self.max_delay_seconds:
            raise ValueError("base_delay_seconds must lie in [0, max_delay_seconds]")
        if self.factor < 1 or not 0 <= self.jitter <= 1:
            raise ValueError("factor must be at least 1 and jitter in [0, 1]")

    def delay_seconds(self, failures: int, error: KVStoreError) -> float:
        """How long to wait after the `failures`-th failure, never less than the server asks for."""
        grown = min(self.max_delay_seconds, self.base_delay_seconds * self.factor ** (failures - 1))
        return max(grown * (1 - self.jitter * random.random()), error.retry_after_seconds or 0.0)  # noqa: S311

    async def run(
        self, operation: Callable[[float], Awaitable[T]], *, timeout: float, clock: Clock = SYSTEM_CLOCK
    ) -> T:
        """Calls `operation(seconds it may take)` until it succeeds; else raises the last error.

        Cancellation and errors that are not KVStoreError pass through at once.
        """
        deadline = clock.now() + timeout
        attempt_seconds = self.attempt_timeout_seconds or timeout
        failures = 0
        while True:
            try:
                return await operation(min(attempt_seconds, deadline - clock.now()))
            except KVStoreError as error:
                failures += 1
                delay = self.delay_seconds(failures, error)
                if not is_retryable(error) or failures == self.attempts or clock.now() + delay >= deadline:
                    raise
            await clock.sleep(delay)


DEFAULT_RETRY = Retry()
NO_RETRY = Retry(attempts=1)
