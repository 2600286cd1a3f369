"""Hears from other servers which sessions came to an end, sooner than `staleness_seconds` would tell."""

import asyncio
import logging

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import Index
from kvstore_server.sessions.registry import Registry

LOG = logging.getLogger(__name__)
PAUSE_SECONDS = 1.0


class Freshness:
    """Listens to the index from one task. What it misses is found when a session is next compared with the store."""

    def __init__(self, index: Index, registry: Registry) -> None:
        self._index, self._registry = index, registry
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _listen(self) -> None:
        while True:
            try:
                async with self._index.subscribe() as notices:
                    async for notice in notices:
                        self._registry.doubt(notice.tenant, notice.session)
            except Unavailable:
                LOG.debug("the index tells no news; listening again in %g s", PAUSE_SECONDS)
            await asyncio.sleep(PAUSE_SECONDS)
