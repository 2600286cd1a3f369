import asyncio
from collections.abc import Callable

import pytest

from kvstore_client import (
    NO_RETRY,
    Aborted,
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    KVStoreError,
    NotFound,
    ResourceExhausted,
    Retry,
    Unavailable,
)
from kvstore_client.errors import CLOSED

RETRY = Retry(attempts=5, base_delay_seconds=1, max_delay_seconds=5, factor=2, jitter=0)


class FakeClock:
    def __init__(self) -> None:
        self.time = 100.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


class Operation:
    """Fails with each error in turn, taking `seconds`, then answers."""

    def __init__(self, clock: FakeClock, *errors: KVStoreError, seconds: float = 0.0) -> None:
        self.clock, self.errors, self.seconds = clock, list(errors), seconds
        self.allowed: list[float] = []

    async def __call__(self, allowed: float) -> str:
        self.allowed.append(allowed)
        self.clock.time += self.seconds
        if self.errors:
            raise self.errors.pop(0)
        return "done"


async def test_a_lost_call_is_made_again_after_growing_capped_delays():
    clock = FakeClock()
    operation = Operation(clock, *(Unavailable("x") for _ in range(4)))
    assert await RETRY.run(operation, timeout=60, clock=clock) == "done"
    assert clock.slept == [1, 2, 4, 5]
    assert operation.allowed == [60, 59, 57, 53, 48]


async def test_the_last_attempt_s_error_is_raised():
    clock = FakeClock()
    operation = Operation(clock, *(Unavailable(str(n)) for n in range(9)))
    with pytest.raises(Unavailable, match="4"):
        await RETRY.run(operation, timeout=1000, clock=clock)
    assert len(operation.allowed) == 5


async def test_a_server_that_is_away_for_long_is_asked_until_the_call_s_own_deadline():
    clock = FakeClock()
    operation = Operation(clock, *(Unavailable("x") for _ in range(100)), seconds=0.1)
    assert await Retry(jitter=0).run(operation, timeout=600, clock=clock) == "done"
    assert len(operation.allowed) == 101


async def test_a_call_that_a_stopping_server_cancels_is_made_again():
    clock = FakeClock()
    operation = Operation(clock, Cancelled("x"))
    assert await RETRY.run(operation, timeout=60, clock=clock) == "done"


@pytest.mark.parametrize(
    "error", [InvalidArgument("x"), NotFound("x"), Aborted("x"), Internal("x"), Cancelled("x", reason=CLOSED)]
)
async def test_what_cannot_succeed_is_tried_once(error: KVStoreError):
    clock = FakeClock()
    operation = Operation(clock, error)
    with pytest.raises(type(error)):
        await RETRY.run(operation, timeout=60, clock=clock)
    assert len(operation.allowed) == 1


async def test_a_full_server_is_asked_again_only_when_it_says_so():
    clock = FakeClock()
    with pytest.raises(ResourceExhausted):
        await RETRY.run(Operation(clock, ResourceExhausted("x")), timeout=60, clock=clock)
    told = Operation(clock, ResourceExhausted("x", retry_after_seconds=7.5))
    assert await RETRY.run(told, timeout=60, clock=clock) == "done"
    assert clock.slept == [7.5]


async def test_a_short_hint_does_not_undercut_the_backoff():
    clock = FakeClock()
    await RETRY.run(Operation(clock, ResourceExhausted("x", retry_after_seconds=0.01)), timeout=60, clock=clock)
    assert clock.slept == [1]


async def test_a_wait_beyond_the_deadline_is_not_begun():
    clock = FakeClock()
    with pytest.raises(ResourceExhausted):
        await RETRY.run(Operation(clock, ResourceExhausted("x", retry_after_seconds=60)), timeout=60, clock=clock)
    assert clock.slept == []


async def test_a_deadline_of_one_attempt_is_retried_while_the_call_has_time_left():
    clock = FakeClock()
    retry = Retry(attempts=9, base_delay_seconds=1, jitter=0, factor=1, attempt_timeout_seconds=10)
    operation = Operation(clock, *(DeadlineExceeded("x") for _ in range(9)), seconds=10)
    with pytest.raises(DeadlineExceeded):
        await retry.run(operation, timeout=25, clock=clock)
    assert operation.allowed == [10, 10, 3]


def test_jitter_shortens_a_delay_by_at_most_its_share():
    retry = Retry(base_delay_seconds=1, jitter=0.5)
    delays = {retry.delay_seconds(1, Unavailable("x")) for _ in range(200)}
    assert len(delays) > 100
    assert 0.5 <= min(delays) <= max(delays) <= 1


async def test_other_exceptions_and_cancellation_pass_at_once():
    calls = 0

    def failing(error: type[BaseException]) -> Callable[[float], asyncio.Future[None]]:
        def operation(_: float) -> asyncio.Future[None]:
            nonlocal calls
            calls += 1
            raise error

        return operation

    for error in (ValueError, asyncio.CancelledError):
        with pytest.raises(error):
            await RETRY.run(failing(error), timeout=1, clock=FakeClock())
    assert calls == 2


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"base_delay_seconds": 3.0}, {"base_delay_seconds": -1.0}, {"factor": 0.5}, {"jitter": 1.5}],
)
def test_a_policy_that_makes_no_sense_cannot_be_built(wrong: dict[str, float]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Retry(**wrong)  # type: ignore[arg-type]


async def test_no_retry_is_one_attempt():
    clock = FakeClock()
    with pytest.raises(Unavailable):
        await NO_RETRY.run(Operation(clock, Unavailable("x")), timeout=9, clock=clock)
