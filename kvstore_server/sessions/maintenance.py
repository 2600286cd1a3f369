"""What a server does of its own accord, every now and then: tell of uses, expire, collect garbage."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from heapq import nlargest
from itertools import chain
from random import uniform
from time import monotonic, time
from uuid import uuid4

from kvstore_server.errors import KVStoreError
from kvstore_server.metadata.index import Census, Holdings, Index, SessionEntry
from kvstore_server.sessions.cooling import Cooling
from kvstore_server.sessions.expiry import Expiry
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)
SWEEPS, COLLECTIONS_PER_GRACE = 2, 2
"""In each `sweep_seconds`, so that a census of another server is no older when it is used; in each grace."""
LARGEST = 20
PAGE = 1_000


class Maintenance:
    """Any number of servers may do the same over one store, and one of them does what grows with the sessions.

    It is the one whose census the index keeps. That is put at the end of a sweep and forgotten `sweep_seconds` later:
    when its server is gone, hangs or fails, whoever looks next finds none and sweeps. So at times two do, which is as
    safe as it is useless.
    """

    def __init__(
        self,
        store: ObjectStore,
        index: Index,
        registry: Registry,
        indexing: Indexing,
        cooling: Cooling,
        expiry: Expiry,
        quotas: Quotas,
        *,
        sweep_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._store, self._index, self._registry, self._expiry = store, index, registry, expiry
        self._indexing, self._cooling, self._quotas = indexing, cooling, quotas
        self._sweep_seconds, self._grace_seconds = sweep_seconds, grace_seconds
        self._name = uuid4().hex
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_ours = False
        self.census = Census(taken_by=self._name, age_seconds=0, kept_seconds=sweep_seconds, tenants={}, largest=())

    def start(self) -> None:
        sweeps = self._again(self._sweep_seconds / SWEEPS, self.sweep)
        collections = self._again(self._grace_seconds / COLLECTIONS_PER_GRACE, self.collect_if_ours)
        self._tasks = {asyncio.create_task(each) for each in (sweeps, collections)}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _again(self, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(seconds * uniform(0.5, 1.0))  # noqa: S311
            try:
                await work()
            except KVStoreError as error:
                LOG.warning("maintenance waits for the next time: %s", error)
            except Exception:
                LOG.exception("maintenance failed")

    async def sweep(self) -> bool:
        """Tells the index of the uses since the last time. Counts what is there and ends what nobody uses, unless
        another server has just done so: False."""
        for live in self._registry.opened():
            if live.used_at > live.told_at:
                used_at = live.used_at
                when = time() - (monotonic() - used_at)
                await self._index.touch(live.state.tenant, live.state.session, when)
                live.told_at = used_at
        found = await self._index.census()
        self._is_ours = found is None or found.taken_by == self._name
        if found is None or self._is_ours:
            self.census = await self._look_at_all()
            await self._index.put_census(self.census)
            return True
        self.census = found
        for tenant, holdings in found.tenants.items():
            self._quotas.measured(tenant, holdings, found.age_seconds)
        self._cooling.rest()
        self._expiry.rest()
        return False

    async def _look_at_all(self) -> Census:
        """Counts first, for it must be known of a census when it was taken: the rest may take long."""
        names, began = await self._tenants(), monotonic()
        with suppress(KVStoreError):  # an index that takes nothing may still be read
            await self._indexing.flush()  # so that what was taken in until then is listed
        listed = {tenant: await self._entries(tenant) for tenant in names}
        tenants = {tenant: Holdings.of(entries) for tenant, entries in listed.items()}
        for tenant, entries in listed.items():
            self._quotas.measured(tenant, tenants[tenant], monotonic() - began, entries)
        for tenant, entries in listed.items():
            await self._cooling.sweep(tenant, entries)
            await self._expiry.sweep(tenant, entries)
        return Census(
            taken_by=self._name,
            age_seconds=monotonic() - began,
            kept_seconds=self._sweep_seconds,
            tenants=tenants,
            largest=tuple(nlargest(LARGEST, chain(*listed.values()), key=lambda entry: entry.stored_bytes)),
        )

    async def collect_if_ours(self) -> None:
        if self._is_ours:
            await self.collect()

    async def collect(self) -> int:
        """Removes garbage; how many objects. A session that is damaged keeps what it has."""
        removed = 0
        for tenant in await self._tenants():
            # Twice: another server may serve an expired generation until the grace is over by its own clock.
            collector = Collector(self._store, tenant, 2 * self._grace_seconds, time)
            for session in await asyncio.to_thread(self._store.list_folders, tenant):
                with suppress(KVStoreError):
                    removed += await asyncio.to_thread(collector.collect, session)
        return removed

    async def _entries(self, tenant: str) -> list[SessionEntry]:
        entries: list[SessionEntry] = []
        while page := await self._index.list(tenant, after=entries[-1].name if entries else "", limit=PAGE):
            entries += page
        return entries

    async def _tenants(self) -> list[str]:
        folders = await asyncio.to_thread(self._store.list_folders, "")
        return [name for name in folders if not name.startswith("_")]
