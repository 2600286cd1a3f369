"""A key that is revoked in the store ends at every server over it, on streams that are open too."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic

import pytest
import torch

from kvstore_client import NO_RETRY, AsyncKVStoreClient, Unauthenticated, Unavailable
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_server.app import Server
from kvstore_server.identity import key_ring
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.storage.local import LocalStore

from ..running import serving

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=1, head_dim=32, dtype="float32", sm_scale=1.0)
REVOKED_SECONDS_MAX = 5.0
KEYS = {"api_keys": True}


def client_of(server: Server, token: str) -> AsyncKVStoreClient:
    return AsyncKVStoreClient(f"127.0.0.1:{server.port}", api_key=token, retry=NO_RETRY)


async def test_a_revoked_key_is_refused_within_five_seconds_by_every_server_and_on_an_open_stream(
    tmp_path: Path,
) -> None:
    keys = KeyStore(LocalStore(tmp_path))
    token, other = keys.create("a", "writer"), keys.create("a", "writer")
    async with (
        serving(tmp_path, identity=KEYS) as first,
        serving(tmp_path, identity=KEYS) as second,
        client_of(first, token) as client,
        client_of(second, token) as elsewhere,
        client_of(first, other) as unharmed,
    ):
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(torch.ones(1, 2, 1, 32), torch.ones(1, 2, 1, 32))
        await session.attend(0, torch.ones(1, 1, 32))
        keys.revoke(token.split("_")[1])
        began = monotonic()

        async def until_refused(call: Callable[[], Awaitable[object]]) -> None:
            while monotonic() < began + 2 * REVOKED_SECONDS_MAX:
                await call()
                await asyncio.sleep(0.05)

        for call in (
            lambda: session.attend(0, torch.ones(1, 1, 32)),  # on the stream that is open
            lambda: client.open_session("s"),
            lambda: elsewhere.open_session("s"),
        ):
            with pytest.raises(Unauthenticated):
                await until_refused(call)
            assert monotonic() - began < REVOKED_SECONDS_MAX
        assert (await unharmed.open_session("s")).length == 2


async def test_a_server_that_cannot_read_the_keys_refuses_all_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "REFRESH_SECONDS", 0.05)
    monkeypatch.setattr(key_ring, "STALE_SECONDS", 0.5)
    token = KeyStore(LocalStore(tmp_path)).create("a", "writer")
    async with serving(tmp_path, identity=KEYS) as server, client_of(server, token) as client:
        await client.server_info()
        with monkeypatch.context() as broken:
            broken.setattr(KeyStore, "all", lambda self: 1 / 0)
            await asyncio.sleep(1)
            with pytest.raises(Unavailable) as refused:
                await client.server_info()
            assert refused.value.reason == "KEYS_STALE"
        await asyncio.sleep(0.5)
        await client.server_info()
