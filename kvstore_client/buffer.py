"""Gathering the few tokens of each decode step into appends worth sending."""

import asyncio
from typing import Self

from kvstore_client.frames import Block, Layers, block_of
from kvstore_client.session import APPEND_TIMEOUT_SECONDS, Session

BUFFER_TOKENS = 256


class AppendBuffer:
    """Collects up to `tokens` tokens of a session and appends them together.

        async with AppendBuffer(session) as buffer:
            await buffer.append(k, v)

    Leaving the block flushes. Nothing is lost on an error: what was taken stays until it is durable, and the next
    call sends the very same append again, so that an unknown outcome is settled, not doubled. One writer a session.
    """

    def __init__(self, session: Session, tokens: int = BUFFER_TOKENS, *, encode: bool = False) -> None:
        if tokens < 1:
            raise ValueError(f"tokens {tokens} is below 1")
        self._session, self._tokens, self._encode = session, tokens, encode
        self._taken: list[Block] = []
        self._start: int | None = None
        """Where the taken tokens begin, fixed by the first attempt to send them."""
        self._lock = asyncio.Lock()

    @property
    def pending(self) -> int:
        """Tokens that are taken and not yet durable."""
        return sum(block.tokens for block in self._taken)

    async def append(self, k: Layers, v: Layers, *, timeout: float = APPEND_TIMEOUT_SECONDS) -> None:
        """Takes a copy, once there is room; if it raises, it has taken nothing of this call."""
        block = block_of(k, v, self._session.shape)
        async with self._lock:
            if self._taken and (self._start is not None or self.pending + block.tokens > self._tokens):
                await self._send(timeout)
            self._taken.append(block.copy())

    async def flush(self, *, timeout: float = APPEND_TIMEOUT_SECONDS) -> int:
        """Makes everything taken durable; returns the session's length."""
        async with self._lock:
            if self._taken:
                await self._send(timeout)
            return self._session.length

    async def _send(self, timeout: float) -> None:
        if self._start is None:
            self._start = self._session.length
            self._taken = [Block.joined(self._taken)]
        block = self._taken[0]
        await self._session.append(block.keys, block.values, start=self._start, encode=self._encode, timeout=timeout)
        self._taken, self._start = [], None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.flush()
