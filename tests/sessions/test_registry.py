"""What is open, while other servers go on with it."""

import asyncio
from threading import Event
from typing import Any

import pytest

from kvstore_codecs.plan import Fit
from kvstore_server.limits import Limits
from kvstore_server.sessions import registry as module
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.sessions.registry import Registry

from ..storage.inputs import SHAPE, TENANT, commit_log, created, next_segment, random_fit
from ..storage.memory_store import MemoryStore


async def test_a_session_can_be_opened_while_the_fit_that_another_server_made_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, reading, opened, read_fit = MemoryStore(), Event(), Event(), module.read_fit
    elsewhere = commit_log(store)
    state = created(elsewhere)
    registry = Registry(store, Projecting(store, Limits()), 1 << 30, 60.0, 3600.0)
    live = await registry.open(TENANT, "a", None)
    elsewhere.commit(state, next_segment(elsewhere, state, 10, exact=1, fit=random_fit(SHAPE)))

    def slow(*args: Any) -> Fit:
        if not reading.is_set():
            reading.set()
            assert opened.wait(5)
        return read_fit(*args)

    monkeypatch.setattr(module, "read_fit", slow)
    discovering = asyncio.create_task(registry.discover(live))
    assert await asyncio.to_thread(reading.wait, 5)
    assert (await registry.open(TENANT, "a", None)).info().fitted
    opened.set()
    await discovering
