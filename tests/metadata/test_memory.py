import pytest

from kvstore_server.errors import Unavailable
from kvstore_server.metadata import memory
from kvstore_server.metadata.index import Notice
from kvstore_server.metadata.memory import MemoryIndex

from .entries import entry


async def test_a_subscriber_that_does_not_read_learns_that_it_missed_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NOTICES_WAITING_MAX", 4)
    index = MemoryIndex()
    async with index.subscribe() as notices:
        for length in range(100):
            await index.publish(Notice(tenant="default", session="a", generation="1", length=length))
        assert [(await anext(notices)).length for _ in range(3)] == [0, 1, 2]
        with pytest.raises(Unavailable):
            await anext(notices)


async def test_a_removal_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(memory, "monotonic", lambda: now)
    index = MemoryIndex()
    await index.remove("default", "a", "5")
    now = memory.REMOVED_KEPT_SECONDS + 1.0
    await index.remove("default", "b", "5")
    assert await index.put(entry("a", generation=5))
    assert not await index.put(entry("b", generation=5))
