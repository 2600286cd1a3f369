"""Clients that append, read back and attend without a pause, and remember what was acknowledged."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, ChannelOptions, GrpcTransport, Session
from kvstore_client.access import access_to
from kvstore_codecs.spec import RAW, ModelShape

from .tally import Row

SHAPE = ModelShape(layers=2, kv_heads=1, query_heads=2, head_dim=32, dtype="float16", sm_scale=0.2)
TOKENS = 512
"""Of one session."""
TIMEOUT_SECONDS = 120.0
PAUSE_SECONDS = 0.1
"""Between a worker's rounds: what was written is read back by every replica at the end."""


OPERATIONS_BETWEEN_MAX = 20
"""Of all workers, from one disturbance to the next."""
RECONNECT = ChannelOptions(reconnect_seconds_max=0.1)
"""A server that is there again is found at once, so that disturbances meet work and not waiting."""


class Lost(AssertionError):
    """What was acknowledged is not there, or is something else."""


@cache
def vectors(name: str) -> tuple[Tensor, Tensor]:
    """Keys and values [layers, TOKENS, kv_heads, head_dim] of the session of that name."""
    made = torch.Generator().manual_seed(crc32(name.encode()))
    k, v = torch.randn(2, SHAPE.layers, TOKENS, SHAPE.kv_heads, SHAPE.head_dim, generator=made).half()
    return k, v


class Worker:
    """Writes sessions, one after the other, and reads them back. Nothing that it calls may fail."""

    def __init__(self, name: str, seed: int) -> None:
        self.acknowledged: dict[str, int] = {}
        self.operations = 0
        self._name, self._chance = name, random.Random(seed)

    async def run(self, client: AsyncKVStoreClient, stop: asyncio.Event) -> None:
        while not stop.is_set():
            name = f"{self._name}-{len(self.acknowledged)}"
            self.acknowledged[name] = 0
            await self._fill(await client.create_session(name, SHAPE, RAW, timeout=TIMEOUT_SECONDS), stop)

    async def _fill(self, session: Session, stop: asyncio.Event) -> None:
        k, v = vectors(session.name)
        start = 0
        while not stop.is_set() and start < TOKENS:
            end = min(start + self._chance.randint(1, 32), TOKENS)
            length = await session.append(k[:, start:end], v[:, start:end], start=start, timeout=TIMEOUT_SECONDS)
            if length != end:
                raise Lost(f"{session.name}: the length is {length} instead of {end}")
            self.acknowledged[session.name] = start = end
            self.operations += 1
            await check(session, max(0, end - self._chance.randint(1, 64)), end)
            self.operations += 1
            q = torch.ones(1, SHAPE.query_heads, SHAPE.head_dim)
            await session.attend(1, q, end=end, timeout=TIMEOUT_SECONDS)
            self.operations += 1
            await asyncio.sleep(PAUSE_SECONDS)

    async def check_all(self, client: AsyncKVStoreClient) -> None:
        """Lost unless everything that was acknowledged is there."""
        for name, length in self.acknowledged.items():
            session = await client.create_session(name, SHAPE, RAW, timeout=TIMEOUT_SECONDS)
            if session.length < length:
                raise Lost(f"{name}: the length is {session.length}, acknowledged were {length}")
            await check(session, 0, length)
            self.operations += 1


async def check(session: Session, start: int, end: int) -> None:
    """Lost unless positions [start, end) are what was sent, bit for bit."""
    k, v = vectors(session.name)
    found = await session.fetch(start=start, end=end, timeout=TIMEOUT_SECONDS)
    if not (torch.equal(found[0], k[:, start:end]) and torch.equal(found[1], v[:, start:end])):
        raise Lost(f"{session.name}: positions [{start}, {end}) are not what was sent")


async def work_through(
    disturb: Callable[[int], Awaitable[None]],
    cycles: int,
    row: Row,
    *,
    target: str | list[str],
    workers: int,
    check_at: Sequence[str] = (),
) -> None:
    """Runs workers, disturbs them again and again, and compares what is there at the end: at all of `check_at`.

    Raises Lost, or the error of a call that failed although it may not.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    crew = [Worker(f"w{number}", chance.randrange(2**32)) for number in range(workers)]
    stop = asyncio.Event()
    transport = GrpcTransport(target, RECONNECT, access_to(target)) if isinstance(target, str) else None
    try:
        async with AsyncKVStoreClient(target, transport=transport) as client:
            running = asyncio.gather(*(worker.run(client, stop) for worker in crew))
            for cycle in range(cycles):
                goal = sum(worker.operations for worker in crew) + chance.randint(0, OPERATIONS_BETWEEN_MAX)
                while sum(worker.operations for worker in crew) < goal and not running.done():
                    await asyncio.wait({running}, timeout=0.005)
                if running.done():
                    break
                await asyncio.sleep(chance.uniform(0, 0.05))
                await disturb(cycle)
                row.step(cycles)
            stop.set()
            await running
        for each in check_at or [target]:
            async with AsyncKVStoreClient(each) as client:
                for worker in crew:
                    await worker.check_all(client)
    except BaseException:
        row.losses += 1
        raise
    finally:
        row.operations += sum(worker.operations for worker in crew)
