"""A device that fails ends its server: calls in flight are told so, and nothing wrong is answered."""

from pathlib import Path

import pytest
import torch

from kvstore_client import NO_RETRY, AsyncKVStoreClient, Unavailable
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_kernels.backend import ReferenceBackend

from ..running import serving

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=2, head_dim=32, dtype="float32", sm_scale=0.2)


class BrokenDevice(RuntimeError):
    pass


async def test_a_lost_device_answers_unavailable_and_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}", retry=NO_RETRY) as client:
        session = await client.create_session("a", SHAPE, RAW)
        await session.append(torch.randn(1, 8, 1, 32), torch.randn(1, 8, 1, 32))
        await session.attend(0, torch.randn(1, 2, 32))
        assert not server.failed.is_set()

        def broken(*_: object, **__: object) -> None:
            raise BrokenDevice("an illegal memory access was encountered")

        monkeypatch.setattr(ReferenceBackend, "attend_all", broken)
        monkeypatch.setattr(server._engine, "_is_fatal", lambda error: isinstance(error, BrokenDevice))
        with pytest.raises(Unavailable) as lost:
            await session.attend(0, torch.randn(1, 2, 32))
        assert lost.value.reason == "DEVICE_LOST"
        assert "memory access" not in str(lost.value)
        assert server.failed.is_set()
        with pytest.raises(Unavailable):
            await session.append(torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32))
