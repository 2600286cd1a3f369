"""Calls about a session that is open: they read no more of the store than they must, and its rows stay loaded."""

from pathlib import Path

import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.spec import RAW
from kvstore_server.sessions import registry
from kvstore_server.storage.local import LocalStore

from ..running import serving
from .test_durability import SHAPE, vectors


async def test_what_is_loaded_stays_loaded_when_it_is_created_again_or_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []
    load = registry.extend_resident

    def counted(log, state, resident, end) -> None:
        loads.append(end)
        load(log, state, resident, end)

    monkeypatch.setattr(registry, "extend_resident", counted)
    q = torch.zeros(1, 4, 32)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(*vectors(5, seed=1))
        await session.attend(0, q)
        known = len(loads)
        again = await client.create_session("s", SHAPE, RAW)
        assert again.length == 5
        await again.attend(0, q)
        updated = await session.update(ttl_seconds=60.0)
        assert updated.ttl_seconds == 60.0
        await session.attend(0, q)
    assert len(loads) == known


async def test_what_was_just_made_is_not_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(name: str):
        read = getattr(LocalStore, name)

        def read_and_count(*args, **kwargs):
            asked.append(name)
            return read(*args, **kwargs)

        return read_and_count

    for name in ("get", "get_range", "list_keys"):
        monkeypatch.setattr(LocalStore, name, counted(name))
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        parent = await client.create_session("parent", SHAPE, RAW)
        await parent.append(*vectors(5, seed=1))
        asked.clear()
        await client.create_session("other", SHAPE, RAW)
        assert asked == ["list_keys", "list_keys"], "of that name's records: before the put and after it"
        asked.clear()
        fork = await parent.fork("fork", end=3)
        assert fork.length == 3
        assert asked.count("get") + asked.count("get_range") == 1, "the parent's log is looked at once"
