"""A damaged object is an error that names its range; everything else goes on."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvstore_client import AsyncKVStoreClient, DataLoss
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_server.cli import app

from ..running import serving

SHAPE = ModelShape(layers=2, kv_heads=1, query_heads=1, head_dim=32, dtype="float32", sm_scale=0.2)


async def store_with_damage(folder: Path) -> Path:
    """Sessions `good` and `bad`, two appends each; one byte of the second append of `bad` is flipped."""
    async with serving(folder) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        for name in ("good", "bad"):
            session = await client.create_session(name, SHAPE, RAW)
            for _ in range(2):
                await session.append(torch.randn(2, 300, 1, 32), torch.randn(2, 300, 1, 32))
    (damaged,) = folder.glob("default/bad/*/log/*300.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    return damaged


async def test_damage_is_named_and_other_sessions_go_on(tmp_path: Path) -> None:
    await store_with_damage(tmp_path)
    q = torch.randn(1, 1, 32)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        bad, good = await client.open_session("bad"), await client.open_session("good")
        for _ in range(2):
            with pytest.raises(DataLoss) as lost:
                await bad.attend(0, q)
            assert lost.value.facts["session"] == "bad"
            assert 300 <= int(lost.value.facts["token_start"]) < int(lost.value.facts["token_end"]) <= 600
        await good.attend(0, q)
        out, _ = await bad.attend(0, q, end=300)
        assert torch.isfinite(out).all()


async def test_a_file_of_another_session_is_refused(tmp_path: Path) -> None:
    damaged = await store_with_damage(tmp_path)
    (other,) = tmp_path.glob("default/good/*/log/*300.safetensors")
    damaged.write_bytes(other.read_bytes())
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(DataLoss):
            await (await client.open_session("bad")).attend(0, torch.randn(1, 1, 32), end=600)


async def test_verify_lists_damage_and_exits_1(tmp_path: Path) -> None:
    await store_with_damage(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "default/bad" in result.output
    assert "layer 1 values" in result.output
    assert "positions [556, 600)" in result.output
    assert "default/good" not in result.output
