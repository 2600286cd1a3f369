"""Ends sessions that nobody has used for their TTL: slowly, and not at all when too many seem due at once."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import monotonic, time

from kvstore_server.metadata.index import SessionEntry
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.session_state import SessionState

LOG = logging.getLogger(__name__)
OBSERVED_SECONDS = 60.0
"""A session is due only if it was so at two sweeps this far apart: every server has told of its uses meanwhile."""
SHARE_MAX, COUNT_MIN = 0.1, 8
"""More than this share of the sessions, and more than this many, are due at once only if a clock is wrong."""


class Expiry:
    """TTL and pin are facts of the store; the last use comes from the index, where all servers note it.

    Without an index nothing expires; one that was rebuilt counts every session as used when it was.
    """

    def __init__(
        self,
        registry: Registry,
        indexing: Indexing,
        clock: Callable[[], float] = time,
        monotonic_clock: Callable[[], float] = monotonic,
    ) -> None:
        self._registry, self._indexing = registry, indexing
        self._clock, self._monotonic = clock, monotonic_clock
        self._due_since: dict[SessionEntry, float] = {}
        self._stopped: set[str] = set()

    @property
    def stopped(self) -> bool:
        """Too many sessions of a tenant were due at the last sweep."""
        return bool(self._stopped)

    def rest(self) -> None:
        """Another server sweeps; what was seen here counts no longer."""
        self._due_since.clear()
        self._stopped.clear()

    async def sweep(self, tenant: str, entries: Sequence[SessionEntry]) -> int:
        """Ends what is due of all the tenant's sessions, as the index has them; how many."""
        now, observed = self._clock(), self._monotonic()
        due = [entry for entry in entries if _is_due(entry, now)]
        others = {entry: since for entry, since in self._due_since.items() if entry.tenant != tenant}
        since = {entry: self._due_since.get(entry, observed) for entry in due}
        self._due_since = others | since
        ready = [entry for entry in due if observed - since[entry] >= OBSERVED_SECONDS]
        self._stopped.discard(tenant)
        if len(ready) > max(COUNT_MIN, SHARE_MAX * len(entries)):
            self._stopped.add(tenant)
            LOG.error("%d of %d sessions seem to have expired at once: none is ended", len(ready), len(entries))
            return 0
        return sum([await self._end(entry) for entry in ready])

    async def _end(self, entry: SessionEntry) -> bool:
        def is_due(state: SessionState) -> bool:
            return state.ttl_seconds == entry.ttl_seconds and not state.pinned

        log = self._registry.log(entry.tenant)
        ended = await asyncio.to_thread(log.expire, entry.name, entry.generation, is_due)
        if ended is None:
            live = await self._registry.find(entry.tenant, entry.name)  # the index is behind
            if live is not None:
                self._indexing.changed(live)
            else:
                self._indexing.removed(entry.tenant, entry.name, entry.generation)
            return False
        LOG.info("session %s was not used for %g s and has expired", entry.name, entry.ttl_seconds)
        self._registry.forget(entry.tenant, entry.name)
        self._indexing.removed(entry.tenant, entry.name, ended)
        return True


def _is_due(entry: SessionEntry, now_unix_seconds: float) -> bool:
    if entry.ttl_seconds is None or entry.pinned:
        return False
    return entry.last_used_unix_seconds + entry.ttl_seconds < now_unix_seconds
