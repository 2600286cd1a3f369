"""The sessions of one server, put together."""

import asyncio
import logging

from kvstore_server.config import Settings
from kvstore_server.errors import Unavailable
from kvstore_server.memory.growing import pageable
from kvstore_server.metadata.index import Index
from kvstore_server.scheduling.engine import Engine
from kvstore_server.scheduling.pool import Pool
from kvstore_server.sessions.appending import Appending
from kvstore_server.sessions.attention import Device
from kvstore_server.sessions.cooling import Cooling
from kvstore_server.sessions.expiry import Expiry
from kvstore_server.sessions.fetching import Fetching
from kvstore_server.sessions.freshness import Freshness
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.lifecycle import Lifecycle
from kvstore_server.sessions.maintenance import Maintenance
from kvstore_server.sessions.merging import Merging
from kvstore_server.sessions.prefixes import Prefixes
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.quality import Quality
from kvstore_server.sessions.querying import Querying
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.rebuild import rebuild
from kvstore_server.sessions.registry import Registry
from kvstore_server.sessions.warming import Warmer
from kvstore_server.storage.store import ObjectStore
from kvstore_server.telemetry import Telemetry

LOG = logging.getLogger(__name__)
FILL_RETRY_SECONDS = 5.0


class SessionService:
    """What rpc calls: `lifecycle`, `appending`, `querying` and `fetching` over one store, one index and one device."""

    def __init__(
        self,
        store: ObjectStore,
        index: Index,
        engine: Engine,
        device: Device,
        settings: Settings,
        telemetry: Telemetry,
        append_room: Pool,
    ) -> None:
        self.limits, self.telemetry = settings.limits, telemetry
        self.quality = Quality(settings.quality, telemetry)
        self.default_codec = settings.codec
        self._store, grace = store, settings.gc_grace_seconds
        self._shared_index = settings.index.url != "memory"
        self._filling: asyncio.Task[None] | None = None
        self._indexing = Indexing(index)
        paging = device.backend.paging
        self._warmer = Warmer(device.backend)
        self.projecting = Projecting(store, self.limits)
        self.registry = Registry(
            store,
            self.projecting,
            settings.memory.host_bytes_max,
            settings.staleness_seconds,
            grace,
            pageable if paging is None else paging.pinned,
            lambda live: self._warmer.begin(live.state.spec, live.state.shape),
            self.telemetry,
        )
        self._freshness = Freshness(index, self.registry)
        self.expiry = Expiry(self.registry, self._indexing)
        quotas = Quotas(settings.quota_of, 2 * settings.sweep_seconds)  # a census is taken in one, and kept for one
        seconds = settings.sweep_seconds
        cooling = Cooling(
            store, self.registry, self._indexing, settings.downgrade, settings.merge, sweep_seconds=seconds
        )
        times = {"sweep_seconds": seconds, "grace_seconds": grace}
        self.maintenance = Maintenance(
            store, index, self.registry, self._indexing, cooling, self.expiry, quotas, **times
        )
        self.merging = Merging(store, self.registry, self._indexing, settings.merge, **times)
        self.prefixes = Prefixes(self.registry, index, self.limits, grace)
        self.lifecycle = Lifecycle(
            self.registry, self.projecting, self._indexing, quotas, self.limits, self.default_codec
        )
        self.appending = Appending(
            self.registry,
            self._indexing,
            quotas,
            engine,
            device.backend,
            self.limits,
            self.telemetry,
            self.quality,
            append_room,
        )
        self.querying = Querying(self.registry, engine, device, self.limits, self.quality)
        self.fetching = Fetching(self.registry, engine, device, self.limits)

    @property
    def index_lag(self) -> int:
        return self._indexing.lag

    async def start(self) -> None:
        """Fills the index from the store; one that servers share is there already, and is brought up to date meanwhile.

        A damaged session is left out and logged; the others are served.
        """
        self._indexing.start()
        self._freshness.start()
        self.maintenance.start()
        self.merging.start()
        self._filling = asyncio.create_task(self._fill_index())
        if not self._shared_index:
            await self._filling
        await asyncio.to_thread(self._warmer.wait)

    async def _fill_index(self) -> None:
        while True:
            try:
                await rebuild(self._store, self.registry, self._indexing)
            except Unavailable as error:
                LOG.warning("the index is not filled yet: %s", error)
                await asyncio.sleep(FILL_RETRY_SECONDS)
            else:
                return

    async def close(self) -> None:
        """Waits for commits that are under way, then for the index."""
        self._warmer.close()
        if self._filling is not None:
            self._filling.cancel()
        if self.appending.commits:
            await asyncio.wait(set(self.appending.commits), timeout=10)
        await self.quality.settle()
        await self.maintenance.close()
        await self.merging.close()
        await self._freshness.close()
        await self._indexing.close()
