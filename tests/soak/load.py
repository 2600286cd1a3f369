"""Mixed load at a low rate: sessions come, grow, are forked, asked, merged, and go, by deletion or by themselves."""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, Session
from kvstore_codecs.spec import RAW, Affine, CodecSpec, ModelShape, Qjl, Rotated

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=64, dtype="float16", sm_scale=0.125)
CODECS = (
    RAW,
    CodecSpec(keys=Rotated(planes=2), values=Rotated(planes=4), fit_tokens=32),
    CodecSpec(keys=Qjl(bits=128), values=Affine(planes=4), fit_tokens=32),
)
APPENDS = 12
"""Of a session: enough that the server merges some while it lives."""
TOKENS = 32
"""Of an append."""
SESSIONS_OF_A_CLIENT = 5
"""After so many its connection ends, and another client takes over."""
EXPIRING_EACH = 8
"""One session of so many is not deleted but left to its TTL."""
TTL_SECONDS = 20.0


class Wrong(AssertionError):
    """An answer is not what it must be."""


@dataclass
class Load:
    """`workers` callers, each at most one operation in `pause_seconds`. With `leak` no session is ever deleted.

    `operations` counts what was done, by kind. Nothing may fail.
    """

    target: str
    workers: int = 4
    pause_seconds: float = 0.15
    leak: bool = False
    operations: Counter[str] = field(default_factory=Counter)

    async def run(self, stop: asyncio.Event) -> None:
        await asyncio.gather(*(self._work(number, stop) for number in range(self.workers)))

    async def _work(self, number: int, stop: asyncio.Event) -> None:
        chance, names = random.Random(number), count()
        while not stop.is_set():
            async with AsyncKVStoreClient(self.target) as client:
                self.operations["client"] += 1
                for _ in range(SESSIONS_OF_A_CLIENT):
                    if not stop.is_set():
                        await self._life(client, f"w{number}-{next(names)}", chance)

    async def _do(self, kind: str, call: Callable[[], Awaitable[object]]) -> object:
        await asyncio.sleep(self.pause_seconds)
        done = await call()
        self.operations[kind] += 1
        return done

    async def _life(self, client: AsyncKVStoreClient, name: str, chance: random.Random) -> None:
        codec = chance.choice(CODECS)
        expires = not self.leak and chance.randrange(EXPIRING_EACH) == 0
        ttl = TTL_SECONDS if expires else None
        session = await client.create_session(name, SHAPE, codec, ttl_seconds=ttl)
        self.operations["create"] += 1
        source = torch.Generator().manual_seed(chance.randrange(2**32))
        k, v = torch.randn(2, SHAPE.layers, APPENDS * TOKENS, SHAPE.kv_heads, SHAPE.head_dim, generator=source).half()
        for start in range(0, APPENDS * TOKENS, TOKENS):
            await self._do("append", lambda: session.append(k[:, start : start + TOKENS], v[:, start : start + TOKENS]))  # noqa: B023
            await self._ask(session, chance)
        await self._do("fetch", lambda: _fetched(session, codec, k, v))
        fork = await session.fork(f"{name}-fork", end=chance.randint(0, session.length))
        self.operations["fork"] += 1
        await self._do("append", lambda: fork.append(k[:, :TOKENS], v[:, :TOKENS]))
        await self._ask(fork, chance)
        if not self.leak:
            await self._do("delete", fork.delete)
            await self._do("list", lambda: client.list_sessions(limit=20))
            if expires:
                self.operations["left to expire"] += 1
            else:
                await self._do("delete", session.delete)

    async def _ask(self, session: Session, chance: random.Random) -> None:
        layer, q = chance.randrange(SHAPE.layers), torch.randn(2, SHAPE.query_heads, SHAPE.head_dim)
        kind = chance.choice(["attend", "attend", "top-k", "score"])
        if kind == "attend":
            await self._do(kind, lambda: session.attend(layer, q))
        elif kind == "top-k":
            await self._do(kind, lambda: session.topk(layer, q, 8))
        else:
            await self._do(kind, lambda: session.score(layer, q))


async def _fetched(session: Session, codec: CodecSpec, k: Tensor, v: Tensor) -> None:
    """What is kept bit for bit must come back so; of the rest, that it comes."""
    found = await session.fetch()
    if codec == RAW and not (torch.equal(found[0], k) and torch.equal(found[1], v)):
        raise Wrong(f"{session.name} is not what was sent")
