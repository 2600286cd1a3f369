"""TTL over the wire: unused sessions end, whoever matched them may still read, and then their bytes go."""

import asyncio
import time
from pathlib import Path

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, KVStoreError, NotFound
from kvstore_codecs.spec import RAW
from kvstore_server.sessions import expiry

from ..running import serving
from .test_durability import SHAPE, all_equal, vectors

GRACE_SECONDS = 1.0


async def wait_until(condition) -> None:
    give_up = time.monotonic() + 30
    while not await condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


async def test_an_unused_session_ends_is_read_for_a_while_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "OBSERVED_SECONDS", 0.3)
    settings = {"staleness_seconds": 0.1, "sweep_seconds": 0.1, "gc_grace_seconds": GRACE_SECONDS}
    async with (
        serving(tmp_path, **settings) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as reader,
    ):
        session = await client.create_session("s", SHAPE, RAW, ttl_seconds=0.5)
        await session.append(*vectors(5, seed=1))
        kept = await client.create_session("kept", SHAPE, RAW, ttl_seconds=0.5, pinned=True)
        seen = await reader.open_session("s")
        fork = await session.fork("fork", end=2)

        async def is_gone() -> bool:
            return [info.name for info in await client.list_sessions()] == ["fork", "kept"]

        await wait_until(is_gone)
        with pytest.raises(NotFound):
            await client.open_session("s")
        assert all_equal(await seen.fetch(), *vectors(5, seed=1), 5)
        await seen.attend(0, torch.zeros(1, 4, 32))
        with pytest.raises(KVStoreError) as refused:
            await session.append(*vectors(1, seed=2))
        assert refused.value.code == "ABORTED"

        async def is_unreadable() -> bool:
            try:
                await seen.fetch()
            except KVStoreError as error:
                return error.code == "ABORTED"
            return False

        await wait_until(is_unreadable)
        assert all_equal(await fork.fetch(), *vectors(5, seed=1), 2)
        assert len(list(tmp_path.rglob("*.safetensors"))) == 1
        await fork.delete()

        async def is_collected() -> bool:
            return not list(tmp_path.rglob("*.safetensors"))

        await wait_until(is_collected)
        assert (await kept.info()).pinned


async def test_a_session_in_use_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expiry, "OBSERVED_SECONDS", 0.2)
    async with (
        serving(tmp_path, sweep_seconds=0.1) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        session = await client.create_session("s", SHAPE, RAW, ttl_seconds=1.0)
        await session.append(*vectors(5, seed=1))
        for _ in range(30):
            await session.attend(0, torch.zeros(1, 4, 32))
            await asyncio.sleep(0.1)
        assert (await session.info()).length == 5
