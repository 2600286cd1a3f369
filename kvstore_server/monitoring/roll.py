"""Which servers serve the same store: each says every few seconds in the index that it lives."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from time import time

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import Index, ReplicaEntry

LOG = logging.getLogger(__name__)
PERIOD_SECONDS = 5.0


class Roll:
    """`replicas` is what the index told last, this server among them; without an index it stays as it was."""

    def __init__(self, index: Index, me: Callable[[float], ReplicaEntry]) -> None:
        """`me(now)` is this server's entry at a time in unix seconds."""
        self._index, self._me = index, me
        self.replicas: Sequence[ReplicaEntry] = ()

    async def note(self) -> None:
        """Tells of this server and reads who else is there."""
        try:
            await self._index.announce(self._me(time()))
            self.replicas = await self._index.replicas()
        except Unavailable as error:
            LOG.debug("the index does not tell which servers there are: %s", error)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.note()
            await asyncio.sleep(PERIOD_SECONDS)
