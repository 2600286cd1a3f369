import asyncio
from time import monotonic

import pytest

from kvstore_server.errors import DeadlineExceeded
from kvstore_server.sessions.arrivals import Arrivals


async def test_an_append_waits_for_the_one_that_ends_where_it_starts_and_for_no_other():
    arrivals, seen = Arrivals(), list[str]()

    async def next_one() -> None:
        await arrivals.wait(8, monotonic() + 10)
        seen.append("next")

    arrivals.enter(0, 4)
    before = arrivals.enter(4, 8)
    assert arrivals.reach(8)
    assert not arrivals.reach(5)
    waiting = asyncio.create_task(next_one())
    await asyncio.sleep(0.01)
    seen.append("before")
    arrivals.leave(before)
    await waiting
    assert seen == ["before", "next"]
    assert not arrivals.reach(8)


async def test_waiting_for_the_one_before_has_the_append_s_deadline():
    arrivals = Arrivals()
    arrivals.enter(4, 8)
    with pytest.raises(DeadlineExceeded):
        await arrivals.wait(8, monotonic() + 0.01)
