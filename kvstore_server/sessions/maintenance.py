"""What a server does of its own accord, every now and then: tell of uses, expire, collect garbage."""

import asyncio
import logging
from contextlib import suppress
from random import uniform
from time import monotonic, time

from kvstore_server.errors import KVStoreError
from kvstore_server.metadata.index import Index, SessionEntry
from kvstore_server.sessions.cooling import Cooling
from kvstore_server.sessions.expiry import Expiry
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)
COLLECTIONS_PER_GRACE = 2
PAGE = 1_000


class Maintenance:
    """One task. Any number of servers may do the same over one store."""

    def __init__(
        self,
        store: ObjectStore,
        index: Index,
        registry: Registry,
        cooling: Cooling,
        expiry: Expiry,
        quotas: Quotas,
        *,
        sweep_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._store, self._index, self._registry, self._expiry = store, index, registry, expiry
        self._cooling, self._quotas = cooling, quotas
        self._sweep_seconds, self._grace_seconds = sweep_seconds, grace_seconds
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        collected = monotonic()
        while True:
            await asyncio.sleep(self._sweep_seconds * uniform(0.5, 1.0))  # noqa: S311
            try:
                await self.sweep()
                if monotonic() - collected >= self._grace_seconds / COLLECTIONS_PER_GRACE:
                    collected = monotonic()
                    await self.collect()
            except KVStoreError as error:
                LOG.warning("maintenance waits for the next time: %s", error)
            except Exception:
                LOG.exception("maintenance failed")

    async def sweep(self) -> None:
        """Tells the index of the uses since the last time, counts what is there, expires what nobody uses."""
        for live in self._registry.opened():
            if live.used_at > live.told_at:
                used_at = live.used_at
                when = time() - (monotonic() - used_at)
                await self._index.touch(live.state.tenant, live.state.session, when)
                live.told_at = used_at
        for tenant in await self._tenants():
            entries = await self._entries(tenant)
            self._quotas.measured(tenant, entries)
            await self._cooling.sweep(tenant, entries)
            await self._expiry.sweep(tenant, entries)

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
