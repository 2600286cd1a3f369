"""What the index is told, whatever happens at the same time."""

import asyncio

import pytest

from kvstore_server.metadata.index import SessionEntry
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.live import LiveSession

from ..storage.inputs import TENANT, commit_log, created
from ..storage.memory_store import MemoryStore


@pytest.fixture
def index() -> MemoryIndex:
    return MemoryIndex()


@pytest.fixture
def indexing(index: MemoryIndex) -> Indexing:
    return Indexing(index)


@pytest.fixture
def generations() -> list[LiveSession]:
    """Of one name, one after another."""
    log = commit_log(MemoryStore())
    first = created(log)
    log.delete(first.session)
    return [LiveSession(first), LiveSession(created(log))]


async def listed(index: MemoryIndex) -> list[tuple[str, str]]:
    return [(entry.name, entry.generation) for entry in await index.list(TENANT, limit=10)]


async def test_a_delete_is_told_though_an_append_ends_at_the_same_time(
    indexing: Indexing, index: MemoryIndex, generations: list[LiveSession]
) -> None:
    live, _ = generations
    indexing.changed(live)
    await indexing.flush()
    indexing.removed(TENANT, "a", live.generation)
    indexing.changed(live)
    await indexing.flush()
    assert await listed(index) == []


async def test_a_session_that_was_created_again_is_told_though_the_delete_before_it_ends_later(
    indexing: Indexing, index: MemoryIndex, generations: list[LiveSession]
) -> None:
    first, second = generations
    indexing.changed(second)
    indexing.removed(TENANT, "a", first.generation)
    await indexing.flush()
    assert await listed(index) == [("a", second.generation)]


async def test_changes_that_never_end_hold_up_no_list(
    indexing: Indexing, index: MemoryIndex, generations: list[LiveSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, live = generations
    put = index.put

    async def put_while_it_changes(entry: SessionEntry) -> bool:
        await asyncio.sleep(0)
        indexing.changed(live)
        return await put(entry)

    monkeypatch.setattr(index, "put", put_while_it_changes)
    indexing.changed(live)
    async with asyncio.timeout(5):
        assert await indexing.names(TENANT, "", 10, "") == ["a"]
