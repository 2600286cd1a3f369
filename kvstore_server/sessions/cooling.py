"""Cuts sessions that nobody uses to a coarser level, for good: an option before they expire, off unless it is set."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import NamedTuple

from kvstore_server.config import Downgrade, Merge
from kvstore_server.errors import Aborted, DataLoss
from kvstore_server.metadata.index import SessionEntry
from kvstore_server.sessions.cutting import cut_segment
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.keys import refs_folder
from kvstore_server.storage.merging import Cut, MergeBounds, Merger
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What the index said of a session: it is the same for as long as nobody uses it."""

    tenant: str
    name: str
    generation: str
    length: int
    last_used_unix_seconds: float


def _seen(entry: SessionEntry) -> Seen:
    return Seen(entry.tenant, entry.name, entry.generation, entry.length, entry.last_used_unix_seconds)


class Cooling:
    """A session is cold once the index has had the same last use of it for so long by this server's own running clock:
    no clock that jumps, no index that was restored and no restart makes one cold. Pinned ones and those that forks
    share stay as they are.
    """

    def __init__(
        self,
        store: ObjectStore,
        registry: Registry,
        indexing: Indexing,
        downgrade: Downgrade,
        merge: Merge,
        *,
        sweep_seconds: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._store, self._registry, self._indexing = store, registry, indexing
        self._unused_seconds, self._clock = downgrade.unused_seconds, clock
        self._floor = downgrade.keys_level, downgrade.values_level
        self._bounds = MergeBounds(merge.objects_min or 2, merge.object_bytes_max)
        self._sweep_bytes = merge.bytes_per_second_max * sweep_seconds
        self._unused_since: dict[Seen, float] = {}
        self._settled: set[Seen] = set()

    def rest(self) -> None:
        """Another server sweeps; what was seen here counts no longer."""
        self._unused_since.clear()

    async def sweep(self, tenant: str, entries: Sequence[SessionEntry]) -> int:
        """Looks at all sessions of the tenant, as the index has them now; how many objects were cut."""
        if self._unused_seconds is None:
            return 0
        now, count, left = self._clock(), 0, self._sweep_bytes
        seen = {_seen(entry): self._unused_since.get(_seen(entry), now) for entry in entries if not entry.pinned}
        others = {each: when for each, when in self._unused_since.items() if each.tenant != tenant}
        self._unused_since = others | seen
        self._settled &= self._unused_since.keys()
        cold = [each for each, when in seen.items() if now - when >= self._unused_seconds]
        for each in cold:
            while each not in self._settled and left > 0:
                try:
                    written = await self._cut(each)
                except (Aborted, DataLoss) as error:
                    LOG.warning("session %s is not cut: %s", each.name, error)
                    written = None
                if written is None:
                    self._settled.add(each)
                elif written == 0:
                    break
                else:
                    left -= 2 * written
                    count += 1
        return count

    async def _cut(self, seen: Seen) -> int | None:
        """The bytes of one object that was written anew, 0 if another server was first; None if none has to be."""
        live = await self._registry.find(seen.tenant, seen.name)
        if live is None or live.generation != seen.generation or live.plan is None:
            return None
        state = live.state
        if await asyncio.to_thread(self._store.list_keys, refs_folder(state.tenant, state.session, state.generation)):
            return None
        keys, values = (max(pair) for pair in zip(self._floor, state.own_floor, strict=True))
        await self._registry.ensure_fits(live, live.fit_entries)
        plans = [epoch.plan for epoch in await asyncio.to_thread(live.epochs)]
        cut = Cut((keys, values), partial(cut_segment, plans=plans, floor=(keys, values)))
        merger = Merger(self._store, state.tenant, self._bounds)
        if not merger.is_due(state, cut):
            return None
        merged = await asyncio.to_thread(merger.merge, state, cut)
        if merged is None:
            return 0
        await asyncio.to_thread(self._registry.log(state.tenant).superseded, state)
        self._indexing.changed(live, used=False)
        LOG.info("positions [%d, %d) of session %s were cut", merged.start, merged.end, state.session)
        return merged.stored_bytes
