"""Quotas over the wire: refused with a hint, repeats recognised, reads and deletes go on."""

from pathlib import Path

import pytest

from kvstore_client import NO_RETRY, AsyncKVStoreClient, ResourceExhausted
from kvstore_codecs.spec import RAW

from ..running import serving
from .test_durability import SHAPE, all_equal, vectors


async def test_a_full_tenant_reads_deletes_and_repeats(tmp_path: Path) -> None:
    quota = {"sessions_max": 2, "stored_bytes_max": 20_000}
    async with (
        serving(tmp_path, quota=quota, sweep_seconds=0.1) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}", retry=NO_RETRY) as client,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as patient,
    ):
        session = await client.create_session("s", SHAPE, RAW)
        other = await session.fork("f", end=0)
        for create in (client.create_session("t", SHAPE, RAW), session.fork("t", end=0)):
            with pytest.raises(ResourceExhausted) as refused:
                await create
            assert (refused.value.reason, refused.value.facts["quota"]) == ("QUOTA", "sessions_max")
        assert (await client.create_session("s", SHAPE, RAW)).generation == session.generation
        k, v = vectors(60, seed=1)
        await session.append(k, v)
        for handle in (session, other):
            with pytest.raises(ResourceExhausted) as refused:
                await handle.append(*vectors(1, seed=2))
            assert refused.value.retry_after_seconds
        assert await (await client.open_session("s")).append(k, v, start=0) == 60
        assert all_equal(await session.fetch(), k, v, 60)
        await session.delete()
        reopened = await patient.open_session("f")
        assert await reopened.append(*vectors(1, seed=2), timeout=60) == 1
