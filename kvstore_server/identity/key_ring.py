"""The API keys that a server accepts: read from the store again and again, so that what was revoked is soon refused."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kvstore_server.errors import Unavailable
from kvstore_server.identity.api_keys import make_key, parse_key
from kvstore_server.identity.caller import Caller
from kvstore_server.identity.key_store import KeyStore, StoredKey

LOG = logging.getLogger(__name__)
REFRESH_SECONDS = 2.0
STALE_SECONDS = 30.0
"""Of keys that were last read so long ago nobody knows whether they are still good."""


class KeyRing:
    """Refreshed by one task on a thread of its own: the store's other readers must not delay it."""

    def __init__(
        self,
        keys: KeyStore,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._clock, self._monotonic = keys, clock, monotonic
        self._keys: dict[str, StoredKey] = {}
        self._read_at = -float("inf")
        self._thread = ThreadPoolExecutor(1, "kvstore-keys")
        self._task: asyncio.Task[None] | None = None
        _, self._nobody = make_key("nobody", "reader", label="", created_unix_seconds=0, expires_unix_seconds=0)

    async def start(self) -> None:
        """Reads the keys; raises what keeps the store from telling them."""
        await self._refresh()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        self._thread.shutdown(wait=False, cancel_futures=True)

    def caller_of(self, token: str) -> Caller | None:
        """Whose key that is, if it is good. Raises Unavailable if that cannot be known."""
        key_id, secret = parse_key(token) or ("", "")
        key = self._good(key_id)
        record = self._nobody if key is None or key.record is None else key.record
        if not record.fits(secret) or record is self._nobody:
            return None
        return Caller(tenant=record.tenant, role=record.role, name=f"key {key_id}", key_id=key_id)

    def is_good(self, key_id: str) -> bool:
        """Whether the key, accepted before, still is. Raises Unavailable if that cannot be known."""
        return self._good(key_id) is not None

    def refresh(self) -> None:
        """Blocking."""
        began = self._monotonic()
        self._keys = self._store.all()
        self._read_at = began

    def _good(self, key_id: str) -> StoredKey | None:
        if self._monotonic() - self._read_at > STALE_SECONDS:
            raise Unavailable("KEYS_STALE", "the store does not tell whether keys are still good")
        key = self._keys.get(key_id)
        if key is None or key.record is None or key.revoked or key.record.expired(self._clock()):
            return None
        return key

    async def _refresh(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.refresh)

    async def _run(self) -> None:
        failing = False
        while True:
            await asyncio.sleep(REFRESH_SECONDS)
            try:
                await self._refresh()
            except Exception as error:
                if not failing:
                    LOG.warning("the keys cannot be read again; in %g s no key is good: %s", STALE_SECONDS, error)
                failing = True
            else:
                failing = False
