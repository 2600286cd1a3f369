"""Merges the small objects of sessions in the background, slowly."""

import asyncio
import logging
from collections.abc import Iterator
from math import inf
from random import uniform
from time import monotonic

from kvstore_server.config import Merge
from kvstore_server.errors import Aborted, DataLoss, KVStoreError
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)
ROUNDS_PER_GRACE = 2


class Merging:
    """One task: at each sweep the sessions that are open here, now and then all of the store.

    Any number of servers may do the same over one store; of those that merge one session at once one is of use.
    """

    def __init__(
        self,
        store: ObjectStore,
        registry: Registry,
        indexing: Indexing,
        settings: Merge,
        *,
        sweep_seconds: float,
        grace_seconds: float,
    ) -> None:
        self._store, self._registry, self._indexing = store, registry, indexing
        self._rate = settings.bytes_per_second_max
        self._bounds = MergeBounds(settings.objects_min, settings.object_bytes_max) if settings.objects_min else None
        self._sweep_seconds, self._grace_seconds = sweep_seconds, grace_seconds
        self._damaged: set[tuple[str, str, str]] = set()
        self._task: asyncio.Task[None] | None = None
        self.merged = 0
        """Objects that this server has made of others."""

    def start(self) -> None:
        if self._bounds is not None:
            self._task = asyncio.create_task(self._run(self._bounds))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self, bounds: MergeBounds) -> None:
        looked = -inf
        while True:
            await asyncio.sleep(self._sweep_seconds * uniform(0.5, 1.0))  # noqa: S311
            try:
                for live in self._registry.opened():
                    await self._merge(bounds, live.state, live)
                if monotonic() - looked >= self._grace_seconds / ROUNDS_PER_GRACE:
                    looked = monotonic()
                    await self._look_at_all(bounds)
            except KVStoreError as error:
                LOG.warning("merging waits for the next time: %s", error)
            except Exception:
                LOG.exception("merging failed")

    async def _look_at_all(self, bounds: MergeBounds) -> None:
        """Sessions that are not open here: those with many log names are read."""
        known = {(live.state.tenant, live.state.session) for live in self._registry.opened()}
        for tenant, session in await asyncio.to_thread(lambda: list(self._names())):
            if (tenant, session) in known:
                continue
            log, merger = self._registry.log(tenant), Merger(self._store, tenant, bounds)
            try:
                state = await asyncio.to_thread(log.load, session)
                if state is not None and await asyncio.to_thread(merger.may_be_due, state):
                    await asyncio.to_thread(log.appends, state)
                    await self._merge(bounds, state)
            except (Aborted, DataLoss):
                continue

    def _names(self) -> Iterator[tuple[str, str]]:
        for tenant in self._store.list_folders(""):
            if not tenant.startswith("_"):
                yield from ((tenant, session) for session in self._store.list_folders(tenant))

    async def _merge(self, bounds: MergeBounds, state: SessionState, live: LiveSession | None = None) -> None:
        """All that is due in a session whose log was read; a damaged one is left alone from then on."""
        merger, name = Merger(self._store, state.tenant, bounds), (state.tenant, state.session, state.generation)
        while name not in self._damaged and await asyncio.to_thread(merger.is_due, state):
            try:
                merged = await asyncio.to_thread(merger.merge, state)
                if merged is None or await asyncio.to_thread(self._registry.log(state.tenant).superseded, state):
                    return
            except Aborted:
                return
            except DataLoss as error:
                LOG.warning("session %s is not merged: %s", state.session, error)
                self._damaged.add(name)
                return
            self.merged += 1
            if live is not None:
                self._indexing.changed(live, used=False)
            await asyncio.sleep(2 * merged.stored_bytes / self._rate)
