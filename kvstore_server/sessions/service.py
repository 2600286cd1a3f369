"""The sessions of one server, put together."""

import asyncio
import logging

from kvstore_server.config import Settings
from kvstore_server.memory.growing import pageable
from kvstore_server.metadata.index import Index
from kvstore_server.scheduling.engine import Engine
from kvstore_server.sessions.appending import Appending
from kvstore_server.sessions.attention import Device
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.lifecycle import Lifecycle
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.querying import Querying
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)


class SessionService:
    """What rpc calls: `lifecycle`, `appending` and `querying` over one store, one index and one device."""

    def __init__(self, store: ObjectStore, index: Index, engine: Engine, device: Device, settings: Settings) -> None:
        self.limits = settings.limits
        self.default_codec = settings.codec
        self._store = store
        self._indexing = Indexing(index)
        paging = device.backend.paging
        self.projecting = Projecting(store, self.limits)
        self.registry = Registry(
            store,
            self.projecting,
            settings.memory.host_bytes_max,
            settings.staleness_seconds,
            pageable if paging is None else paging.pinned,
        )
        self.lifecycle = Lifecycle(self.registry, self.projecting, self._indexing, self.limits, self.default_codec)
        self.appending = Appending(self.registry, self._indexing, engine, device.backend, self.limits)
        self.querying = Querying(self.registry, engine, device, self.limits)

    @property
    def index_lag(self) -> int:
        return self._indexing.lag

    async def start(self) -> None:
        """Fills an empty index from the store. A damaged session is left out and logged; the others are served."""
        self._indexing.start()
        found = await self.rebuild_index()
        LOG.info("found %d sessions", found)

    async def rebuild_index(self) -> int:
        """Puts every session of the store into the index; how many there are."""
        found = 0
        for tenant in await asyncio.to_thread(self._store.list_folders, ""):
            if tenant.startswith("_"):
                continue
            for name in await asyncio.to_thread(self._store.list_folders, tenant):
                found += await self._index_one(tenant, name)
        return found

    async def _index_one(self, tenant: str, name: str) -> bool:
        try:
            live = await self.registry.find(tenant, name)
        except Exception:
            LOG.exception("a session could not be opened and is left out of the index")
            return False
        if live is None:
            return False
        self._indexing.changed(tenant, live.info())
        return True

    async def close(self) -> None:
        """Waits for commits that are under way, then for the index."""
        if self.appending.commits:
            await asyncio.wait(set(self.appending.commits), timeout=10)
        await self._indexing.close()
