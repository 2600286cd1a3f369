"""Requests at their due times, whatever became of those before.

Latency counts from the due time: a server that stalls is charged for every request that would have been sent meanwhile
(no coordinated omission), and so is a client that cannot keep up.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from kvstore_client.errors import KVStoreError
from kvstore_client.loadtest.tally import Done, Tally


class Operation:
    """What a request of one kind does; `kind` is how it is counted."""

    def __init__(self, kind: str, run: Callable[[int, float], Awaitable[Done]]) -> None:
        """`run(number, due)` returns what was answered, or raises KVStoreError; `due` is on the loop's clock."""
        self.kind, self.run = kind, run


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, seconds), `rate` a second on average."""
    generator = np.random.default_rng(seed)
    expected = rate * seconds
    gaps = generator.exponential(1 / rate, size=int(expected + 10 * expected**0.5 + 10))
    times = np.cumsum(gaps)
    return times[times < seconds].tolist()


async def send(arrivals: Sequence[tuple[int, float]], operation: Callable[[int], Operation], tally: Tally) -> float:
    """Runs operation(number) for each (number, seconds after the start); returns the seconds until all are finished.

    Requests in flight are bounded by the rate times the longest a request may take.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as group:
        for number, offset in arrivals:
            # Sleeping zero seconds, too, lets the answers in.
            await asyncio.sleep(max(0.0, begun + offset - loop.time()))
            group.create_task(_one(operation(number), number, begun, offset, tally))
    return loop.time() - begun


async def _one(operation: Operation, number: int, begun: float, offset: float, tally: Tally) -> None:
    try:
        done = await operation.run(number, begun + offset)
    except KVStoreError as error:
        tally.failed(operation.kind, offset, error.code)
    else:
        tally.answered(operation.kind, offset, asyncio.get_running_loop().time() - begun - offset, done)
