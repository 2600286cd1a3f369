"""Of servers that share an index one sweeps for all, and another does when that one is gone, hangs or fails."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest.mock import AsyncMock

import pytest

from kvstore_server.config import Downgrade, Merge
from kvstore_server.errors import Unavailable
from kvstore_server.limits import Limits
from kvstore_server.metadata import memory
from kvstore_server.metadata.index import SessionEntry
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.sessions import maintenance
from kvstore_server.sessions.cooling import Cooling
from kvstore_server.sessions.expiry import OBSERVED_SECONDS, Expiry
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.maintenance import SWEEPS, Maintenance
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.tenants import Quota

from ..metadata.entries import entry
from ..storage.inputs import SHAPE, SPEC, TENANT
from ..storage.memory_store import MemoryStore

SWEEP_SECONDS = 15.0
SESSIONS, SESSIONS_MAX = 5, 8
TTL_SECONDS = 100.0
Sweep = Callable[[], Awaitable[bool]]


class Clock:
    """Both clocks of all servers, and the index's."""

    now = 2_000_000_000.0

    def __call__(self) -> float:
        return self.now


class CountingIndex(MemoryIndex):
    lists = 0
    away = False

    async def list(self, tenant: str, *, prefix: str = "", after: str = "", limit: int) -> list[SessionEntry]:
        self.lists += 1
        return await super().list(tenant, prefix=prefix, after=after, limit=limit)

    async def census(self):
        if self.away:
            raise Unavailable("INDEX_UNAVAILABLE", "the index does not answer")
        return await super().census()


class Server:
    """What a server does of its own accord."""

    def __init__(self, store: MemoryStore, index: MemoryIndex, clock: Clock) -> None:
        self.registry = Registry(store, Projecting(store, Limits()), 1 << 30, 0.0, 3600.0)
        self.indexing = Indexing(index)
        self.expiry = Expiry(self.registry, self.indexing, clock, clock)
        self.quotas = Quotas(lambda _: Quota(sessions_max=SESSIONS_MAX), 2 * SWEEP_SECONDS, clock)
        parts = (store, self.registry, self.indexing, Downgrade(), Merge())
        self.cooling = Cooling(*parts, sweep_seconds=SWEEP_SECONDS, clock=clock)
        what = (store, index, self.registry, self.indexing, self.cooling, self.expiry, self.quotas)
        self.maintenance = Maintenance(*what, sweep_seconds=SWEEP_SECONDS, grace_seconds=3600.0)
        self.sweep = self.maintenance.sweep

    async def create(self, name: str, ttl_seconds: float | None = None) -> None:
        await self.begin(name, ttl_seconds)
        await self.indexing.flush()

    async def begin(self, name: str, ttl_seconds: float | None = None) -> None:
        """The index has not heard of it."""
        self.registry.log(TENANT).create(name, SHAPE, SPEC, ttl_seconds=ttl_seconds, pinned=False)
        self.quotas.created(self.indexing.changed(await self.registry.open(TENANT, name, None)))

    def room(self) -> int:
        """So many sessions more it would let the tenant create."""
        for count in range(SESSIONS_MAX + 1):
            if self.quotas.session_refusal(TENANT):
                return count
            self.quotas.created(entry(f"room{count}", tenant=TENANT))
        raise AssertionError("no end")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (memory, maintenance):
        monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.fixture
def index() -> CountingIndex:
    return CountingIndex()


@pytest.fixture
async def servers(index: CountingIndex, clock: Clock) -> list[Server]:
    store = MemoryStore()
    servers = [Server(store, index, clock) for _ in range(3)]
    for number in range(SESSIONS):
        await servers[0].create(f"s{number}")
    return servers


async def rounds(sweeps: Sequence[Sweep], clock: Clock, count: int) -> list[bool]:
    """All sweep so often, as far apart as they may; who swept for all the last time."""
    found: list[bool] = []
    for _ in range(count):
        clock.now += SWEEP_SECONDS / SWEEPS
        found = [await sweep() for sweep in sweeps]
    return found


async def test_one_lists_the_sessions_and_all_know_of_them(
    servers: list[Server], index: CountingIndex, clock: Clock
) -> None:
    assert await rounds([each.sweep for each in servers[:1]], clock, 10) == [True]
    alone, index.lists = index.lists, 0
    assert await rounds([each.sweep for each in servers], clock, 10) == [True, False, False]
    assert index.lists == alone
    totals = [each.maintenance.census.total for each in servers]
    assert totals[0].sessions == SESSIONS
    assert totals == [totals[0]] * 3
    assert all(each.maintenance.census.largest for each in servers)


async def test_each_would_list_them_without_a_census(
    servers: list[Server], index: CountingIndex, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is for."""
    monkeypatch.setattr(index, "put_census", AsyncMock())
    assert await rounds([each.sweep for each in servers], clock, 2) == [True, True, True]
    assert index.lists == 2 * 3 * 2  # of a page, and one that is empty


@pytest.mark.parametrize("how", ["gone", "fails", "hangs"])
async def test_another_sweeps_when_the_first_does_not(
    servers: list[Server], clock: Clock, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    first, second, third = (each.sweep for each in servers)
    assert await first()

    async def fail(*_: object) -> int:
        raise Unavailable("STORE_UNAVAILABLE", "the store does not answer")

    async def hang(*_: object) -> int:
        await asyncio.Event().wait()
        return 0

    async def disturbed() -> bool:
        try:
            return await asyncio.wait_for(first(), 0.05)
        except (TimeoutError, Unavailable):
            return False

    monkeypatch.setattr(servers[0].expiry, "sweep", hang if how == "hangs" else fail)
    all_sweep = [second, third] if how == "gone" else [disturbed, second, third]
    assert not any(await rounds(all_sweep, clock, SWEEPS - 1))
    assert await rounds(all_sweep, clock, 1) == [False] * (len(all_sweep) - 2) + [True, False]


async def test_one_that_comes_back_late_leaves_it_to_the_other(servers: list[Server], clock: Clock) -> None:
    first, second, _ = servers
    assert await first.sweep()
    clock.now += SWEEP_SECONDS
    assert await second.sweep()
    assert not await first.sweep()


async def test_without_the_index_nobody_sweeps_and_then_one_does(
    servers: list[Server], index: CountingIndex, clock: Clock
) -> None:
    assert await servers[0].sweep()
    index.away = True
    for each in servers:
        with pytest.raises(Unavailable):
            await each.sweep()
    index.away = False
    await index.clear()
    assert await rounds([each.sweep for each in reversed(servers)], clock, 1) == [True, False, False]


async def test_an_index_that_takes_no_more_does_not_keep_sessions_from_their_end(
    servers: list[Server], index: CountingIndex, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = servers[0]
    await first.create("a", TTL_SECONDS)
    monkeypatch.setattr(index, "put", AsyncMock(side_effect=Unavailable("INDEX_UNAVAILABLE", "it is full")))
    await first.begin("b")
    for seconds in (TTL_SECONDS + 1, OBSERVED_SECONDS):
        clock.now += seconds
        assert await first.sweep()
    assert not await first.registry.find(TENANT, "a")


async def test_what_a_server_saw_before_another_swept_ends_nothing(servers: list[Server], clock: Clock) -> None:
    first, second, _ = servers
    await first.create("a", TTL_SECONDS)
    clock.now += TTL_SECONDS + 1
    assert await first.sweep()  # it is due
    clock.now += SWEEP_SECONDS
    assert await second.sweep()
    assert not await first.sweep()
    clock.now += OBSERVED_SECONDS
    assert await first.sweep()
    assert await first.registry.find(TENANT, "a")
    for _ in range(2):
        clock.now += OBSERVED_SECONDS
        assert await first.sweep()
    assert not await first.registry.find(TENANT, "a")


async def test_one_that_no_longer_sweeps_does_not_say_that_expiry_has_stopped(
    servers: list[Server], clock: Clock
) -> None:
    first, second, _ = servers
    for number in range(10):
        await first.create(f"due{number}", TTL_SECONDS)
    for seconds in (TTL_SECONDS + 1, OBSERVED_SECONDS):
        clock.now += seconds
        assert await first.sweep()
    assert first.expiry.stopped
    clock.now += SWEEP_SECONDS
    assert await second.sweep()
    assert not await first.sweep()
    assert not first.expiry.stopped


async def test_a_quota_counts_what_another_server_found_and_what_came_in_since(
    servers: list[Server], clock: Clock
) -> None:
    first, second, _ = servers
    await second.create("new")
    clock.now += 1
    assert await first.sweep()
    clock.now += 1
    await second.create("newer")  # which that census cannot know
    clock.now += 1
    assert not await second.sweep()
    assert second.room() == SESSIONS_MAX - SESSIONS - 2


async def test_a_quota_counts_once_what_came_in_while_another_server_had_more_to_do_than_count(
    servers: list[Server], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, _ = servers
    sweep = first.cooling.sweep

    async def slow(tenant: str, entries: Sequence[SessionEntry]) -> int:
        clock.now += SWEEP_SECONDS / 4
        if tenant == "another":
            await second.create("new")
        return await sweep(tenant, entries)

    for name in ("another", "zebra"):
        first.registry.log(name).create("s", SHAPE, SPEC)
    monkeypatch.setattr(first.cooling, "sweep", slow)
    await second.create("before")
    assert await first.sweep()
    assert not await second.sweep()
    assert second.room() == SESSIONS_MAX - SESSIONS - 2


@pytest.mark.parametrize("told", ["before", "meanwhile", "after"])
async def test_a_quota_counts_a_session_once_whenever_the_index_hears_of_it(
    servers: list[Server], index: CountingIndex, clock: Clock, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    server, list_page = servers[0], index.list

    async def list_meanwhile(*args: Any, **kwargs: Any) -> list[SessionEntry]:
        if not index.lists and told != "before":
            clock.now += 0.001
            await server.begin("new")
            if told == "meanwhile":
                await server.indexing.flush()
        return await list_page(*args, **kwargs)

    monkeypatch.setattr(index, "list", list_meanwhile)
    if told == "before":
        await server.begin("new")
    assert await server.sweep()
    assert server.room() == SESSIONS_MAX - SESSIONS - 1


async def test_only_the_one_that_sweeps_collects_garbage(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[Maintenance] = []

    async def collect(self: Maintenance) -> int:
        collected.append(self)
        return 0

    monkeypatch.setattr(Maintenance, "collect", collect)
    for each in servers:
        await each.maintenance.collect_if_ours()
    assert not collected
    for each in servers:
        await each.sweep()
        await each.maintenance.collect_if_ours()
    assert collected == [servers[0].maintenance]
