"""The index made anew from what the store holds."""

import asyncio
import logging
from collections.abc import Callable

from kvstore_server.limits import Limits
from kvstore_server.metadata.index import Index
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.store import ObjectStore

LOG = logging.getLogger(__name__)
SENT_AT_ONCE = 100


async def rebuild(
    store: ObjectStore, registry: Registry, indexing: Indexing, progress: Callable[[int], None] = lambda found: None
) -> int:
    """Puts every living session of the store into the index; how many there are.

    A session that cannot be opened is left out and logged. Raises Unavailable if the index does not answer.
    """
    found = 0
    for tenant in await asyncio.to_thread(store.list_folders, ""):
        if tenant.startswith("_"):
            continue
        for name in await asyncio.to_thread(store.list_folders, tenant):
            try:
                live = await registry.find(tenant, name)
            except Exception:
                LOG.exception("a session could not be opened and is left out of the index")
                continue
            if live is not None:
                indexing.changed(live)
                found += 1
                progress(found)
            if found % SENT_AT_ONCE == 0:
                await indexing.flush()
    await indexing.flush()
    LOG.info("found %d sessions", found)
    return found


async def rebuild_from_nothing(store: ObjectStore, index: Index, progress: Callable[[int], None]) -> int:
    """As rebuild, after removing what the index holds. Servers may be running: they go on without missing a commit."""
    await index.clear()
    indexing = Indexing(index)
    try:
        return await rebuild(store, Registry(store, Projecting(store, Limits()), 0, 0.0, 0.0), indexing, progress)
    finally:
        await indexing.close()
