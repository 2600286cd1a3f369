"""What is made ahead: one item, in order, and nothing once nobody wants it."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from kvstore_server.scheduling.ahead import one_ahead


class Made:
    """Counts its items; `held` is set while the one numbered `hold` is being made."""

    def __init__(self, count: int, hold: int | None = None) -> None:
        self.made, self.closed, self.held = 0, False, asyncio.Event()
        self._count, self._hold = count, hold

    async def items(self) -> AsyncGenerator[int]:
        try:
            for number in range(self._count):
                if number == self._hold:
                    self.held.set()
                    await asyncio.sleep(60)
                self.made += 1
                yield number
            raise ValueError("after the last")
        finally:
            self.closed = True


async def test_the_next_item_and_no_other_is_made_while_one_is_used() -> None:
    made = Made(4)
    ahead = one_ahead(made.items())
    for number in range(4):
        assert await anext(ahead) == number
        await asyncio.sleep(0.01)
        assert made.made == min(number + 2, 4)
    with pytest.raises(ValueError, match="after the last"):
        await anext(ahead)


async def test_an_end_is_an_end() -> None:
    async def two() -> AsyncGenerator[int]:
        yield 1
        yield 0

    assert [item async for item in one_ahead(two())] == [1, 0]


async def test_what_is_being_made_is_given_up_with_the_rest() -> None:
    made = Made(3, hold=1)
    ahead = one_ahead(made.items())
    assert await anext(ahead) == 0
    async with asyncio.timeout(5):
        await made.held.wait()
        await ahead.aclose()
    assert made.closed
    assert made.made == 1


async def test_a_caller_that_is_cancelled_gives_up_what_it_waits_for() -> None:
    made = Made(3, hold=0)
    waiting = asyncio.ensure_future(anext(one_ahead(made.items())))
    async with asyncio.timeout(5):
        await made.held.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert made.closed
