"""Sessions that nobody uses end by their TTL: after two looks, never when pinned, and never many at once."""

import pytest

from kvstore_server.limits import Limits
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.sessions import expiry as expiry_module
from kvstore_server.sessions.expiry import COUNT_MIN, OBSERVED_SECONDS, Expiry
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.registry import Registry

from ..storage.inputs import SHAPE, SPEC, TENANT
from ..storage.memory_store import MemoryStore

TTL_SECONDS = 100.0


class Server:
    """What expires sessions, with clocks that the test moves; `steps` sweeps, so far apart that a look counts."""

    def __init__(self, store: MemoryStore, index: MemoryIndex) -> None:
        self.registry = Registry(store, Projecting(store, Limits()), 1 << 30, 0.0, 3600.0)
        self.index = index
        self.indexing = Indexing(index)
        self.wall, self.monotonic = 2_000_000_000.0, 0.0
        self.expiry = Expiry(self.registry, self.indexing, lambda: self.wall, lambda: self.monotonic)

    async def create(self, name: str, ttl_seconds: float | None = TTL_SECONDS, pinned: bool = False) -> None:
        self.registry.log(TENANT).create(name, SHAPE, SPEC, ttl_seconds=ttl_seconds, pinned=pinned)
        await self.known(name)
        await self.use(name)

    async def known(self, name: str) -> None:
        live = await self.registry.open(TENANT, name, None)
        self.indexing.changed(live)
        await self.indexing.names(TENANT, "", 1, "")

    async def use(self, name: str) -> None:
        await self.index.touch(TENANT, name, self.wall)

    async def step(self, seconds: float = OBSERVED_SECONDS) -> int:
        self.wall += seconds
        self.monotonic += seconds
        return await self.expiry.sweep(TENANT, await self.index.list(TENANT, limit=1000))

    async def alive(self) -> list[str]:
        names = self.registry.log(TENANT).sessions()
        return [name for name in names if await self.registry.find(TENANT, name)]


@pytest.fixture
def server() -> Server:
    return Server(MemoryStore(), MemoryIndex())


async def test_a_session_ends_when_it_was_unused_at_two_looks(server: Server) -> None:
    await server.create("a")
    assert [await server.step(seconds) for seconds in (99, 2, 58, 1)] == [0, 0, 0, 0]
    assert await server.alive() == ["a"]
    assert await server.step(2) == 1
    assert await server.alive() == []
    assert await server.indexing.names(TENANT, "", 10, "") == []
    assert await server.step() == 0


async def test_a_use_between_the_looks_starts_over(server: Server) -> None:
    await server.create("a")
    await server.step(101)
    await server.use("a")
    assert [await server.step() for _ in range(2)] == [0, 0]
    assert await server.alive() == ["a"]
    assert [await server.step() for _ in range(2)] == [1, 0]


async def test_pinned_sessions_and_those_without_a_ttl_stay(server: Server) -> None:
    await server.create("pinned", pinned=True)
    await server.create("for-ever", ttl_seconds=None)
    assert sum([await server.step(1000) for _ in range(3)]) == 0
    assert await server.alive() == ["for-ever", "pinned"]


async def test_a_pin_or_ttl_that_the_index_has_not_heard_of_counts(server: Server) -> None:
    for name in ("pin", "longer"):
        await server.create(name)
    for name, ttl_seconds, pinned in (("pin", TTL_SECONDS, True), ("longer", 1e6, False)):
        live = await server.registry.open(TENANT, name, None)
        server.registry.log(TENANT).update(live.state, ttl_seconds=ttl_seconds, pinned=pinned)
    assert sum([await server.step() for _ in range(5)]) == 0
    assert await server.alive() == ["longer", "pin"]


async def test_a_name_that_came_back_unnoticed_is_not_ended(server: Server) -> None:
    await server.create("a")
    log = server.registry.log(TENANT)
    log.delete("a")
    log.create("a", SHAPE, SPEC, ttl_seconds=TTL_SECONDS)
    assert sum([await server.step() for _ in range(4)]) == 0
    assert await server.alive() == ["a"]


async def test_a_clock_that_jumps_ends_nothing_and_says_so(server: Server) -> None:
    for number in range(30):
        await server.create(f"s{number}")
    server.wall += 1e7
    assert [await server.step() for _ in range(3)] == [0, 0, 0]
    assert server.expiry.stopped
    assert len(await server.alive()) == 30
    server.wall -= 1e7 + 3 * OBSERVED_SECONDS
    await server.step(1)
    assert not server.expiry.stopped


async def test_a_tenth_may_end_at_once(server: Server) -> None:
    assert COUNT_MIN < 10
    for number in range(100):
        await server.create(f"s{number}", ttl_seconds=TTL_SECONDS if number < 10 else None)
    assert [await server.step(seconds) for seconds in (101, 61)] == [0, 10]
    assert len(await server.alive()) == 90


async def test_an_expiry_that_looks_once_would_take_a_session_in_use(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second look is for: another server has not told of its uses yet."""
    monkeypatch.setattr(expiry_module, "OBSERVED_SECONDS", 0.0)
    await server.create("a")
    assert await server.step(101) == 1
