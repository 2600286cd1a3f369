"""The index that several servers share, in Redis. What is read from it is parsed strictly and never trusted.

Per tenant: a hash of entries by name (JSON), a sorted set of names for listing, a sorted set of last uses, for each
removed session its generation, for a while, and for each label of a prefix a hash of sessions (JSON). Of all tenants: a
hash of servers (JSON) and, for a while, a census (JSON).
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from redis.asyncio.client import PubSub
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import (
    PREFIX_CANDIDATES,
    REMOVED_KEPT_SECONDS,
    UNIX_SECONDS_MAX,
    Census,
    Notice,
    PrefixEntry,
    ReplicaEntry,
    SessionEntry,
    living,
)
from kvstore_server.metadata.keys import CENSUS, NAMESPACE, NOTICES, REPLICAS, key
from kvstore_server.metadata.redis_client import CONNECTIONS_MAX, IDLE_SECONDS, close, connect
from kvstore_server.metadata.scripts import DROP_PREFIX, FIND_PREFIXES, PAGE, PUT_PREFIXES, READ_CENSUS, STATE, SWAP

log = logging.getLogger(__name__)

PREFIXES_AT_ONCE = 512
CENSUS_BYTES_MAX = 1 << 20
"""Of about 8,000 tenants: with more of them every server counts for itself."""
RACES_MAX = 16
"""Lost races on one session before a write gives up."""

_GENERATION = re.compile(rb"[0-9]{1,15}")

T = TypeVar("T")
Row = tuple[bytes, bytes, bytes]
"""A name, its entry and its last use, as found; empty where there is none."""
Decide = Callable[[SessionEntry | None, int], tuple[SessionEntry | None, int] | None]
"""From what is there (the entry, the last removed generation or -1) to what shall be; None leaves it."""


class RedisIndex:
    """Implements metadata.index.Index. `timeout_seconds` bounds each operation, its retries included."""

    def __init__(
        self,
        url: str,
        *,
        password: str | None = None,
        tls_ca_file: Path | None = None,
        timeout_seconds: float = 1.0,
    ) -> None:
        self.malformed = 0
        self._timeout_seconds = timeout_seconds
        self._connect = partial(
            connect, url, password=password, tls_ca_file=tls_ca_file, timeout_seconds=timeout_seconds
        )
        self._redis = self._connect()
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._state, self._page, self._swap = map(self._redis.register_script, (STATE, PAGE, SWAP))
        scripts = (PUT_PREFIXES, FIND_PREFIXES, DROP_PREFIX)
        self._put_prefixes, self._find_prefixes, self._drop_prefix = map(self._redis.register_script, scripts)
        self._read_census = self._redis.register_script(READ_CENSUS)

    async def put(self, entry: SessionEntry) -> bool:
        def decide(old: SessionEntry | None, removed: int) -> tuple[SessionEntry | None, int] | None:
            stale = entry.version[0] <= removed or (old is not None and old.version > entry.version)
            return None if stale else (entry, removed)

        return await self._change(entry.tenant, entry.name, decide)

    async def remove(self, tenant: str, name: str, generation: str) -> None:
        def decide(old: SessionEntry | None, removed: int) -> tuple[SessionEntry | None, int]:
            removed = max(removed, int(generation))
            return (old if old and old.version[0] > removed else None), removed

        await self._change(tenant, name, decide)

    async def get(self, tenant: str, name: str) -> SessionEntry | None:
        bound = b"[" + name.encode()
        entries = [self._entry(tenant, *row) for row in await self._rows(tenant, bound, bound, 0, 1)]
        return entries[0] if entries else None

    async def list(self, tenant: str, *, prefix: str = "", after: str = "", limit: int) -> list[SessionEntry]:
        first = b"(" + after.encode() if after >= prefix and after else b"[" + prefix.encode()
        last = b"[" + prefix.encode() + b"\xff"
        entries: list[SessionEntry] = []
        offset = 0
        while missing := limit - len(entries):
            rows = await self._rows(tenant, first, last, offset, missing)
            entries += [entry for row in rows if (entry := self._entry(tenant, *row))]
            offset += missing
            if len(rows) < missing:
                break
        return entries

    async def touch(self, tenant: str, name: str, unix_seconds: float) -> None:
        async with self._bounded():
            try:
                await self._redis.zadd(key(tenant, "used"), {name: unix_seconds}, xx=True, gt=True)
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._distrust("last uses of sessions")

    async def put_prefixes(self, tenant: str, entries: Sequence[tuple[str, PrefixEntry]]) -> None:
        for some in batched(entries, PREFIXES_AT_ONCE):
            async with self._bounded():
                await self._put_prefixes(
                    [key(tenant, "prefix", label) for label, _ in some],
                    [text for _, entry in some for text in (entry.session, entry.model_dump_json())],
                )

    async def find_prefixes(self, tenant: str, labels: Sequence[str]) -> Sequence[Sequence[PrefixEntry]]:
        found: list[Sequence[PrefixEntry]] = []
        for some in batched(labels, PREFIXES_AT_ONCE):
            async with self._bounded():
                keys = [key(tenant, "prefix", label) for label in some]
                rows: list[list[bytes]] = await self._find_prefixes(keys, [PREFIX_CANDIDATES])
            found += [[entry for value in row if (entry := self._prefix(value))] for row in rows]
        return found

    async def drop_prefix(self, tenant: str, label: str, session: str) -> None:
        async with self._bounded():
            await self._drop_prefix([key(tenant, "prefix", label)], [session])

    async def publish(self, notice: Notice) -> None:
        async with self._bounded():
            await self._redis.publish(NOTICES, notice.model_dump_json())

    @asynccontextmanager
    async def subscribe(self) -> AsyncGenerator[AsyncIterator[Notice]]:
        client = self._connect(retries=0)
        try:
            async with self._bounded():
                await client.initialize()  # of a cluster: where its slots are
            async with client.pubsub() as channel:
                async with self._bounded():
                    await channel.subscribe(NOTICES)
                    while await channel.get_message(timeout=self._timeout_seconds) is None:
                        pass
                async with aclosing(self._notices(channel)) as notices:
                    yield notices
        finally:
            await close(client)

    async def _notices(self, channel: PubSub) -> AsyncGenerator[Notice]:
        asked = False
        while True:
            with _unavailable():
                message = await channel.get_message(timeout=IDLE_SECONDS)
                if message is None and asked:
                    raise TimeoutError
                if message is None:
                    await channel.ping()
            asked = message is None
            if message and message["type"] == "message":
                try:
                    yield Notice.model_validate_json(message["data"])
                except ValidationError:
                    self._distrust("a notice")

    async def announce(self, replica: ReplicaEntry) -> None:
        async with self._bounded():
            await self._redis.hset(REPLICAS, replica.name, replica.model_dump_json())

    async def replicas(self) -> Sequence[ReplicaEntry]:
        async with self._bounded():
            values = await self._redis.hgetall(REPLICAS)
            entries = {name: entry for name, value in values.items() if (entry := self._replica(value))}
            found = living(entries.values())
            if gone := [name for name in values if entries.get(name) not in found]:
                await self._redis.hdel(REPLICAS, *gone)
        return found

    async def put_census(self, census: Census) -> None:
        async with self._bounded():
            await self._redis.set(CENSUS, census.model_dump_json(), px=_milliseconds(census.kept_seconds))

    async def census(self) -> Census | None:
        async with self._bounded():
            value, left = await self._read_census([CENSUS], [CENSUS_BYTES_MAX])
        if not value:
            return None
        try:
            census = Census.model_validate_json(value)
        except ValidationError:
            return self._distrust("a census")
        if not 0 <= left <= _milliseconds(census.kept_seconds):  # Redis's clock went back: it would stay for too long
            return self._distrust("a census without its end")
        return census.later(census.kept_seconds - left / 1e3)

    async def ping(self) -> None:
        async with self._bounded():
            await self._redis.ping()

    async def clear(self) -> None:
        with _unavailable():
            async for name in self._redis.scan_iter(f"{NAMESPACE}*", count=1000):
                await self._redis.unlink(name)

    async def close(self) -> None:
        await close(self._redis)

    async def _change(self, tenant: str, name: str, decide: Decide) -> bool:
        keys = [*_keys(tenant), key(tenant, "removed", name)]
        async with self._bounded():
            for _ in range(RACES_MAX):
                old_value, old_removed = await self._state(keys, [name])
                removed_before = int(old_removed) if _GENERATION.fullmatch(old_removed) else -1
                decision = decide(self._entry(tenant, name.encode(), old_value, b""), removed_before)
                if decision is None:
                    return False
                entry, removed = decision
                value = entry.model_dump_json() if entry else ""
                used = entry.last_used_unix_seconds if entry else 0
                kept = "" if removed == removed_before else str(removed)
                arguments = [name, old_value, old_removed, value, used, kept, REMOVED_KEPT_SECONDS]
                if await self._swap(keys, arguments):
                    return True
        raise Unavailable("INDEX_UNAVAILABLE", f"{RACES_MAX} other writes of this session came first")

    async def _rows(self, tenant: str, first: bytes, last: bytes, offset: int, count: int) -> Sequence[Row]:
        async with self._bounded():
            rows = await self._page(_keys(tenant), [first, last, offset, count])
        if rows is None:
            self._distrust("names of sessions")
        return rows or []

    def _entry(self, tenant: str, name: bytes, value: bytes, used: bytes) -> SessionEntry | None:
        if not value:
            return None
        try:
            entry, last_used = SessionEntry.model_validate_json(value), float(used or 0)
        except ValueError:  # pydantic's, too
            return self._distrust("an entry")
        if (entry.tenant, entry.name) != (tenant, name.decode(errors="replace")):
            return self._distrust("an entry of another session")
        if entry.last_used_unix_seconds < last_used <= UNIX_SECONDS_MAX:
            return entry.model_copy(update={"last_used_unix_seconds": last_used})
        return entry

    def _prefix(self, value: bytes) -> PrefixEntry | None:
        try:
            return PrefixEntry.model_validate_json(value)
        except ValidationError:
            return self._distrust("a prefix")

    def _replica(self, value: bytes | str) -> ReplicaEntry | None:
        try:
            return ReplicaEntry.model_validate_json(value)
        except ValidationError:
            return self._distrust("a replica")

    def _distrust(self, what: str) -> None:
        self.malformed += 1
        log.warning("the index holds %s that this program did not write", what)

    @asynccontextmanager
    async def _bounded(self) -> AsyncGenerator[None]:
        with _unavailable():
            async with asyncio.timeout(self._timeout_seconds), self._slots:
                yield


@contextmanager
def _unavailable() -> Generator[None]:
    try:
        yield
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        raise Unavailable("INDEX_UNAVAILABLE", "the index does not answer") from error


def _milliseconds(seconds: float) -> int:
    return ceil(seconds * 1e3)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _keys(tenant: str) -> list[str]:
    return [key(tenant, part) for part in ("sessions", "names", "used")]
