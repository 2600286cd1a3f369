"""Requests at the times a Poisson process says, whatever became of those before.

Latency counts from the intended time: a server that stalls is charged for every request that would have been sent
meanwhile (no coordinated omission), and so is a client that cannot keep up.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from kvstore_client.errors import KVStoreError
from kvstore_client.loadtest.tally import Tally

Request = Callable[[int], Awaitable[object]]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times in [0, seconds), `rate` a second on average."""
    generator = np.random.default_rng(seed)
    expected = rate * seconds
    gaps = generator.exponential(1 / rate, size=int(expected + 10 * expected**0.5 + 10))
    times = np.cumsum(gaps)
    return times[times < seconds].tolist()


async def send(workers: Sequence[Request], arrivals: Sequence[float], tally: Tally) -> float:
    """Request i goes to worker i modulo their number at arrivals[i]; returns the seconds until all are finished.

    Requests in flight are bounded by the rate times the longest a worker's request may take.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.TaskGroup() as group:
        for number, offset in enumerate(arrivals):
            # Sleeping zero seconds, too, lets the answers in.
            await asyncio.sleep(max(0.0, begun + offset - loop.time()))
            group.create_task(_one(workers[number % len(workers)], number, begun + offset, tally))
    return loop.time() - begun


async def _one(worker: Request, number: int, intended: float, tally: Tally) -> None:
    try:
        await worker(number)
    except KVStoreError as error:
        tally.errors[error.code] += 1
    else:
        tally.record(asyncio.get_running_loop().time() - intended)
