"""What one worker's requests do, one class a kind."""

import asyncio

from torch import Tensor

from kvstore_client import Session
from kvstore_client.loadtest.checking import Expected, holds_what_was_sent
from kvstore_client.loadtest.tally import Done
from kvstore_client.loadtest.vectors import Vectors

DISTINCT_QUERIES = 16


class Asking:
    """Queries of one pinned prefix, layers in turn, query rows in turn; every answer is checked."""

    def __init__(self, session: Session, rows: Tensor, expected: Expected, *, top_k: int, timeout: float) -> None:
        self._prefix, self._shape = session.pin(), session.shape
        self._rows, self._expected, self._top_k, self._timeout = rows, expected, top_k, timeout
        self._layer_bytes = session.length * session.shape.raw_bytes_per_token // session.shape.layers

    async def attend(self, number: int, _: float) -> Done:
        layer, row, q = self._query(number)
        out, lse = await self._prefix.attend(layer, q, timeout=self._timeout)
        right = self._expected.is_attention(layer, row, out, lse)
        return Done(q.nbytes + out.nbytes + lse.nbytes, self._layer_bytes, right)

    async def top_k(self, number: int, _: float) -> Done:
        layer, row, q = self._query(number)
        answer = await self._prefix.topk(layer, q, self._top_k, timeout=self._timeout)
        wire = q.nbytes + answer.positions.nbytes + answer.logits.nbytes
        return Done(wire, self._layer_bytes // 2, self._expected.is_top_k(layer, row, answer))

    def _query(self, number: int) -> tuple[int, int, Tensor]:
        layer, row = number % self._shape.layers, number // self._shape.layers % len(self._rows)
        return layer, row, self._rows[row : row + 1]


class Appending:
    """Appends to one session, which nobody else writes, one after the other; checked at the end.

    After an append whose outcome is unknown the next one sends the same tokens again, which the store recognises.
    """

    def __init__(self, session: Session, vectors: Vectors, tokens: int, timeout: float) -> None:
        self._session, self._vectors, self._tokens, self._timeout = session, vectors, tokens, timeout
        self._turn = asyncio.Lock()

    async def append(self, _: int, __: float) -> Done:
        async with self._turn:
            start = self._session.length
            k, v = self._vectors.between(start, start + self._tokens)
            await self._session.append(k, v, start=start, timeout=self._timeout)
        return Done(k.nbytes + v.nbytes, k.nbytes + v.nbytes)

    async def is_there(self) -> bool | None:
        """Whether what was acknowledged is what the store holds; None if nothing was appended."""
        if not self._session.length:
            return None
        return await holds_what_was_sent(self._session, self._vectors, self._session.length, self._timeout)
