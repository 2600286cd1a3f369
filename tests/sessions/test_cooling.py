"""Which sessions are cut to a coarser level, when, and what a reader of them then knows."""

import pytest
import torch

from kvstore_codecs.plan import SignPlan
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import CodecSpec, Rotated
from kvstore_kernels import Signs
from kvstore_server.config import Downgrade, Merge
from kvstore_server.limits import Limits
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.sessions.cooling import Cooling
from kvstore_server.sessions.cutting import cut_segment, widened
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.collecting import Collector

from ..storage.inputs import SHAPE, TENANT, next_segment
from ..storage.memory_store import MemoryStore

SPEC = CodecSpec(keys=Rotated(planes=3), values=Rotated(planes=3), sink_tokens=0, mean="none")
PLAN = plan_for(SPEC, SHAPE, None)
UNUSED_SECONDS = 100.0
FLOOR = (2, 1)


class Server:
    """What cools sessions, by a clock that the test moves."""

    def __init__(self, unused_seconds: float | None = UNUSED_SECONDS) -> None:
        self.store, self.index, self.now = MemoryStore(), MemoryIndex(), 0.0
        self.registry = Registry(self.store, Projecting(self.store, Limits()), 1 << 30, 0.0, 3600.0)
        self.indexing = Indexing(self.index)
        self.cooling = Cooling(
            self.store,
            self.registry,
            self.indexing,
            Downgrade(unused_seconds=unused_seconds, keys_level=FLOOR[0], values_level=FLOOR[1]),
            Merge(),
            sweep_seconds=15,
            clock=lambda: self.now,
        )

    async def create(self, name: str, pinned: bool = False) -> None:
        log = self.registry.log(TENANT)
        state, _ = log.create(name, SHAPE, SPEC, pinned=pinned)
        for seed in range(3):
            log.commit(state, next_segment(log, state, 4, seed=seed, widths=(3, 1)))
        self.indexing.changed(await self.registry.open(TENANT, name, None))
        await self.indexing.flush()

    async def step(self, seconds: float) -> int:
        self.now += seconds
        entries = await self.index.list(TENANT, limit=100)
        cut = await self.cooling.sweep(TENANT, entries)
        await self.indexing.flush()
        return cut


def signs_of(rows: KindRows) -> Signs:
    assert rows.signs
    return rows.signs


async def test_a_session_is_cut_once_when_it_was_unused_for_so_long() -> None:
    server = Server()
    await server.create("a")
    assert [await server.step(seconds) for seconds in (0, 99, 1, 50, 500)] == [0, 0, 1, 0, 0]
    live = await server.registry.find(TENANT, "a")
    assert live
    assert live.state.floor == FLOOR
    assert [(each.start, each.end, each.floor) for each in live.state.merged] == [(0, 12, FLOOR)]


async def test_a_use_starts_the_wait_again_and_being_cut_is_none() -> None:
    server = Server()
    await server.create("a")
    await server.step(0)
    await server.step(99)
    entry = await server.index.get(TENANT, "a")
    assert entry
    await server.index.touch(TENANT, "a", entry.last_used_unix_seconds + 1)
    assert [await server.step(seconds) for seconds in (1, 98, 1, 1)] == [0, 0, 0, 1]
    after = await server.index.get(TENANT, "a")
    assert after
    assert after.last_used_unix_seconds == entry.last_used_unix_seconds + 1
    assert after.stored_bytes < entry.stored_bytes


async def test_pinned_shared_and_with_the_setting_off_all_sessions_stay_whole() -> None:
    server = Server()
    await server.create("pinned", pinned=True)
    await server.create("shared")
    parent = await server.registry.find(TENANT, "shared")
    assert parent
    server.registry.log(TENANT).fork(parent.state, 5, "child")
    assert [await server.step(seconds) for seconds in (0, 1000)] == [0, 0]
    off = Server(unused_seconds=None)
    await off.create("a")
    assert [await off.step(seconds) for seconds in (0, 1000)] == [0, 0]


async def test_readers_from_before_and_forks_from_after_know_that_bits_are_gone() -> None:
    server = Server()
    await server.create("a")
    log = server.registry.log(TENANT)
    old = log.load("a")
    assert old
    entries = log.appends(old)
    await server.step(0)
    assert await server.step(UNUSED_SECONDS) == 1
    assert Collector(server.store, TENANT, 0.0, lambda: 3e9).collect("a") == 3
    segment = log.read(old, entries[1])
    assert (old.floor, segment.header.floor) == (FLOOR, FLOOR)
    child, _ = log.fork(old, 6, "child")
    found = log.load("child")
    assert found
    log.appends(found)
    assert found.floor == FLOOR
    assert child.floor == FLOOR


def test_a_cut_segment_reads_at_its_floor_and_below_as_it_did_and_can_be_cut_again() -> None:
    server = Server()
    log = server.registry.log(TENANT)
    state, _ = log.create("a", SHAPE, SPEC)
    whole = next_segment(log, state, 5, widths=(3, 1))
    cut = cut_segment(whole, [PLAN], (1, 0))
    plan = PLAN.of(1, "keys")
    assert isinstance(plan, SignPlan)
    kept = plan.levels[1].read_words(0)
    assert torch.equal(signs_of(cut.of(1, "keys")).words, signs_of(whole.of(1, "keys")).words[:, :kept])
    assert torch.equal(signs_of(cut.of(1, "keys")).scales, signs_of(whole.of(1, "keys")).scales)
    again = signs_of(widened(cut.of(1, "keys"), plan, 1)).words
    assert again.shape == signs_of(whole.of(1, "keys")).words.shape
    assert torch.equal(again[:, :kept], signs_of(whole.of(1, "keys")).words[:, :kept])
    assert not again[:, kept:].any()
    with pytest.raises(ValueError, match="words a token"):
        widened(cut.of(1, "keys"), plan, 2)
