"""Keeps the index near the truth, never on the way of an acknowledgement."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from time import time
from typing import Any, TypeAlias

from kvstore_server.errors import ResourceExhausted, Unavailable
from kvstore_server.metadata.index import Index, Notice, SessionEntry
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.prefixes import prefix_entries

LOG = logging.getLogger(__name__)
PENDING_MAX = 10_000
Key: TypeAlias = tuple[str, str, bool]
"""Tenant, session and whether it is removed."""


class Indexing:
    """Sends changes to the index from one task, newest per session; what it cannot send is retried, then dropped.

    A removal and another change of a session never take each other's place: they may be of two generations, and come
    in any order. The index goes by the generations.

    Dropping is safe: everything in the index can be rebuilt from the store, and reads by name never ask it.
    """

    RETRY_SECONDS = 1.0
    CLOSE_SECONDS = 1.0

    def __init__(self, index: Index) -> None:
        self._index = index
        self._pending: dict[Key, Callable[[], Coroutine[Any, Any, object]]] = {}
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def lag(self) -> int:
        """Changes that the index has not seen."""
        return len(self._pending)

    def start(self) -> None:
        self._task = asyncio.create_task(self._send_forever())

    async def close(self) -> None:
        """Sends what waits, for CLOSE_SECONDS at most, then stops."""
        if self._task is not None:
            self._task.cancel()
        try:
            await asyncio.wait_for(self._send_pending(), self.CLOSE_SECONDS)
        except (TimeoutError, Unavailable, ResourceExhausted):
            LOG.warning("the index has not heard of %d changes", self.lag)
        await self._index.close()

    def changed(self, live: LiveSession, *, used: bool = True) -> SessionEntry:
        """The session is there, as it is known now, and was used; what the index is told. Its fit must be known."""
        now, tenant, info = time(), live.state.tenant, live.info()
        entry = SessionEntry(
            tenant=tenant,
            name=info.name,
            generation=info.generation,
            length=info.length,
            stored_bytes=info.stored_bytes,
            raw_bytes=info.raw_bytes,
            ttl_seconds=info.ttl_seconds,
            pinned=info.pinned,
            model_fingerprint=info.shape.model_fingerprint,
            created_unix_seconds=info.created_unix_seconds,
            last_used_unix_seconds=max(now if used else 0.0, info.created_unix_seconds),
        )

        async def send() -> None:
            await self._index.put(entry)
            known = len(live.state.entries or ())
            await self._index.put_prefixes(tenant, prefix_entries(live, live.indexed_entries))
            live.indexed_entries = known

        self._queue((tenant, info.name, False), send)
        return entry

    def removed(self, tenant: str, name: str, generation: str) -> None:
        async def send() -> None:
            await self._index.remove(tenant, name, generation)
            await self._index.publish(Notice(tenant=tenant, session=name, generation=generation, length=0))

        self._queue((tenant, name, True), send)

    async def flush(self) -> None:
        """Sends what waits now. Raises Unavailable when the index does not answer."""
        for key in list(self._pending):
            await self._send(key)

    async def names(self, tenant: str, prefix: str, limit: int, after: str) -> list[str]:
        """Session names in order, after what waits was sent. Raises Unavailable when the index does not answer."""
        await self.flush()
        entries = await self._index.list(tenant, prefix=prefix, after=after, limit=limit)
        return [entry.name for entry in entries]

    def _queue(self, key: Key, send: Callable[[], Coroutine[Any, Any, object]]) -> None:
        if len(self._pending) >= PENDING_MAX and key not in self._pending:
            LOG.warning("the index lags by %d changes; one is dropped: rebuild-index restores it", PENDING_MAX)
            return
        self._pending[key] = send
        self._wake.set()

    async def _send_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._send_pending()
            except (Unavailable, ResourceExhausted) as error:
                LOG.warning("the index does not take changes, %d wait: %s", self.lag, error)
                await asyncio.sleep(self.RETRY_SECONDS)
                self._wake.set()

    async def _send_pending(self) -> None:
        while self._pending:
            await self._send(next(iter(self._pending)))

    async def _send(self, key: Key) -> None:
        if (send := self._pending.get(key)) is None:
            return
        await send()
        if self._pending.get(key) is send:
            del self._pending[key]
