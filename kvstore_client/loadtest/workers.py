"""Workers that share one session of random keys and values."""

import asyncio
from collections.abc import Awaitable, Callable

import torch
from torch import Tensor

from kvstore_client import Session
from kvstore_client.errors import KVStoreError
from kvstore_client.loadtest.tally import Tally
from kvstore_codecs.spec import ModelShape
from kvstore_kernels import as_torch_dtype

APPEND_BYTES = 64 << 20
"""Of random vectors that are held at one time."""
DISTINCT_QUERIES = 64
VERIFY_EVERY = 50
AGREEMENT = 1e-6


async def fill(session: Session, tokens: int, seed: int, progress: Callable[[int], None]) -> None:
    """Appends `tokens` of standard normal keys and values."""
    shape, generator = session.shape, torch.Generator().manual_seed(seed)
    piece = max(1, APPEND_BYTES // shape.raw_bytes_per_token)
    while session.length < tokens:
        size = (2, shape.layers, min(piece, tokens - session.length), shape.kv_heads, shape.head_dim)
        k, v = torch.randn(size, generator=generator).to(as_torch_dtype(shape.dtype))
        progress(await session.append(k, v))


def queries(shape: ModelShape, seed: int) -> list[Tensor]:
    """Standard normal rows [1, Hq, D]."""
    size = (DISTINCT_QUERIES, 1, shape.query_heads, shape.head_dim)
    return list(torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(as_torch_dtype(shape.dtype)))


class AttendWorker:
    """Attends to one layer a request, layers in turn; every VERIFY_EVERY-th query is asked again and compared."""

    def __init__(self, session: Session, rows: list[Tensor], timeout_seconds: float, tally: Tally) -> None:
        self._prefix = session.pin()
        self._layers, self._rows, self._timeout, self._tally = session.shape.layers, rows, timeout_seconds, tally
        self._checks: set[asyncio.Task[None]] = set()

    async def warm_up(self) -> None:
        """Raises what keeps this worker from being answered."""
        await self._attend(0)

    async def request(self, number: int) -> None:
        answer = await self._attend(number)
        if number % VERIFY_EVERY == 0:
            # Apart, so that it is not part of the request's latency.
            check = asyncio.create_task(self._verify(number, answer))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)

    async def finish(self) -> None:
        """Waits for the comparisons."""
        await asyncio.gather(*self._checks)

    def _attend(self, number: int) -> Awaitable[tuple[Tensor, Tensor]]:
        q = self._rows[number % len(self._rows)]
        return self._prefix.attend(number % self._layers, q, timeout=self._timeout)

    async def _verify(self, number: int, answer: tuple[Tensor, Tensor]) -> None:
        try:
            again = await self._attend(number)
        except KVStoreError:
            return
        self._tally.verified += 1
        if not all(
            torch.allclose(a.float(), b.float(), rtol=0, atol=AGREEMENT) for a, b in zip(answer, again, strict=True)
        ):
            self._tally.mismatched += 1
