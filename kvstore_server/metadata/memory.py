"""The index of a server that runs alone: in its own memory, rebuilt by listing the store at the start."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from heapq import nsmallest
from itertools import islice
from time import monotonic

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import (
    PREFIX_CANDIDATES,
    REMOVED_KEPT_SECONDS,
    Census,
    Notice,
    PrefixEntry,
    ReplicaEntry,
    SessionEntry,
    living,
)

NOTICES_WAITING_MAX = 4_096


class MemoryIndex:
    """Implements metadata.index.Index within one event loop."""

    malformed = 0

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, SessionEntry]] = {}
        self._removed: dict[tuple[str, str], tuple[int, float]] = {}
        self._prefixes: dict[tuple[str, str], dict[str, PrefixEntry]] = {}
        self._replicas: dict[str, ReplicaEntry] = {}
        self._census: tuple[Census, float] | None = None
        self._subscribers: set[asyncio.Queue[Notice | None]] = set()

    async def put(self, entry: SessionEntry) -> bool:
        entries = self._entries.setdefault(entry.tenant, {})
        old = entries.get(entry.name)
        removed, _ = self._removed.get((entry.tenant, entry.name), (-1, 0.0))
        if entry.version[0] <= removed or (old and old.version > entry.version):
            return False
        last_used = max(entry.last_used_unix_seconds, old.last_used_unix_seconds if old else 0)
        entries[entry.name] = entry.model_copy(update={"last_used_unix_seconds": last_used})
        return True

    async def remove(self, tenant: str, name: str, generation: str) -> None:
        now = monotonic()
        removed = max(int(generation), self._removed.pop((tenant, name), (-1, 0.0))[0])
        while self._removed and next(iter(self._removed.values()))[1] <= now:
            del self._removed[next(iter(self._removed))]
        self._removed[tenant, name] = removed, now + REMOVED_KEPT_SECONDS
        entries = self._entries.get(tenant, {})
        if name in entries and entries[name].version[0] <= removed:
            del entries[name]

    async def get(self, tenant: str, name: str) -> SessionEntry | None:
        return self._entries.get(tenant, {}).get(name)

    async def list(self, tenant: str, *, prefix: str = "", after: str = "", limit: int) -> list[SessionEntry]:
        entries = self._entries.get(tenant, {})
        names = nsmallest(limit, (name for name in entries if name.startswith(prefix) and name > after))
        return [entries[name] for name in names]

    async def touch(self, tenant: str, name: str, unix_seconds: float) -> None:
        entry = await self.get(tenant, name)
        if entry and entry.last_used_unix_seconds < unix_seconds:
            self._entries[tenant][name] = entry.model_copy(update={"last_used_unix_seconds": unix_seconds})

    async def put_prefixes(self, tenant: str, entries: Sequence[tuple[str, PrefixEntry]]) -> None:
        for label, entry in entries:
            self._prefixes.setdefault((tenant, label), {})[entry.session] = entry

    async def find_prefixes(self, tenant: str, labels: Sequence[str]) -> Sequence[Sequence[PrefixEntry]]:
        found = (self._prefixes.get((tenant, label), {}).values() for label in labels)
        return [tuple(islice(entries, PREFIX_CANDIDATES)) for entries in found]

    async def drop_prefix(self, tenant: str, label: str, session: str) -> None:
        entries = self._prefixes.get((tenant, label), {})
        entries.pop(session, None)
        if not entries:
            self._prefixes.pop((tenant, label), None)

    async def publish(self, notice: Notice) -> None:
        for queue in self._subscribers:
            if queue.qsize() < NOTICES_WAITING_MAX:
                queue.put_nowait(notice if queue.qsize() < NOTICES_WAITING_MAX - 1 else None)

    @asynccontextmanager
    async def subscribe(self) -> AsyncGenerator[AsyncIterator[Notice]]:
        queue: asyncio.Queue[Notice | None] = asyncio.Queue()
        self._subscribers.add(queue)
        try:
            async with aclosing(self._notices(queue)) as notices:
                yield notices
        finally:
            self._subscribers.discard(queue)

    async def _notices(self, queue: "asyncio.Queue[Notice | None]") -> AsyncGenerator[Notice]:
        while notice := await queue.get():
            yield notice
        raise Unavailable("INDEX_UNAVAILABLE", "notices came faster than they were read")

    async def announce(self, replica: ReplicaEntry) -> None:
        self._replicas[replica.name] = replica

    async def replicas(self) -> Sequence[ReplicaEntry]:
        found = living(self._replicas.values())
        self._replicas = {each.name: each for each in found}
        return found

    async def put_census(self, census: Census) -> None:
        self._census = census, monotonic()

    async def census(self) -> Census | None:
        if self._census is None:
            return None
        census, put_at = self._census
        passed = monotonic() - put_at
        return census.later(passed) if passed < census.kept_seconds else None

    async def ping(self) -> None:
        return

    async def clear(self) -> None:
        self._entries.clear()
        self._removed.clear()
        self._prefixes.clear()
        self._replicas.clear()
        self._census = None

    async def close(self) -> None:
        return
