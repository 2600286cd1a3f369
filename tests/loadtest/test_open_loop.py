import asyncio
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from kvstore_client.errors import ResourceExhausted

pytest.importorskip("hdrh", reason="the loadtest extra is not installed")

from kvstore_client.loadtest.open_loop import Operation, poisson_arrivals, send
from kvstore_client.loadtest.tally import Done, Tally

STALL_SECONDS = 0.4


class StallingServer:
    """Answers at once, except that whatever comes while it stalls waits for the end of the stall."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._stalled_until = 0.0

    async def request(self, number: int, _: float) -> Done:
        now = asyncio.get_running_loop().time()
        if number == self._first:
            self._stalled_until = now + STALL_SECONDS
        if now < self._stalled_until:
            await asyncio.sleep(self._stalled_until - now)
        return Done()


async def sent(run: Callable[[int, float], Awaitable[Done]], due: list[float]) -> Tally:
    tally = Tally()
    await send(list(enumerate(due)), lambda _: Operation("kind", run), tally)
    return tally


async def test_a_stall_is_charged_to_every_request_that_fell_into_it() -> None:
    tally = await sent(StallingServer(first=100).request, [0.002 * i for i in range(500)])
    # A closed loop would have sent one request into the stall: 1 in 500, invisible at p99.
    assert tally.all.answered == 500
    assert tally.all.percentile(99) >= STALL_SECONDS * 0.9
    assert tally.all.percentile(70) >= STALL_SECONDS * 0.1


async def test_a_client_that_is_late_is_charged_too() -> None:
    async def blocks_the_loop(*_: float) -> Done:
        time.sleep(0.1)  # noqa: ASYNC251
        return Done()

    assert (await sent(blocks_the_loop, [0.0, 0.01, 0.02])).all.percentile(100) >= 0.25


async def test_requests_do_not_wait_for_those_before() -> None:
    in_flight = most = 0

    async def slow(*_: float) -> Done:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0.2)
        in_flight -= 1
        return Done()

    await sent(slow, [0.001 * i for i in range(50)])
    assert most == 50


async def test_failures_are_counted_by_code_and_bugs_are_raised() -> None:
    async def busy(*_: float) -> Done:
        raise ResourceExhausted("full")

    async def broken(*_: float) -> Done:
        raise ZeroDivisionError

    tally = await sent(busy, [0.0, 0.001])
    assert (dict(tally.all.errors), tally.all.answered) == ({"RESOURCE_EXHAUSTED": 2}, 0)
    with pytest.raises(ExceptionGroup) as raised:
        await sent(broken, [0.0])
    assert raised.group_contains(ZeroDivisionError)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = np.array(poisson_arrivals(rate=1000, seconds=20, seed=0))
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert 0 <= times.min() <= times.max() < 20
    counts = np.histogram(times, bins=2000, range=(0, 20))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.15)
    assert poisson_arrivals(1000, 20, seed=0) == times.tolist()
    assert poisson_arrivals(rate=0.001, seconds=1, seed=0) == []
