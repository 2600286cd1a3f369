"""A session that nobody uses loses bits for good; what is left of it is answered as that level was before."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvstore_client import AsyncKVStoreClient, FailedPrecondition, Precision, Session
from kvstore_codecs.spec import CodecSpec, Qjl, Rotated
from kvstore_server.cli import app
from kvstore_server.storage.session_state import SessionState

from ..running import serving
from .test_durability import CODEC, SHAPE, vectors

FLOOR = Precision(1, 1)
LENGTH = 600
SETTINGS = {"staleness_seconds": 0.1, "sweep_seconds": 0.1, "gc_grace_seconds": 0.5}
DOWNGRADE = {"unused_seconds": 0.5, "keys_level": 1, "values_level": 1}
CODECS = {
    "rotated": CODEC,
    "qjl": CodecSpec(keys=Qjl(bits=96), values=Qjl(bits=64), fit_tokens=64),
    "a layer with fewer levels": CodecSpec(keys=Rotated(planes=3), values=Rotated(planes=1), fit_tokens=64),
}


async def answers(session: Session, precision: Precision, end: int = LENGTH) -> list[torch.Tensor]:
    q = torch.randn(2, SHAPE.query_heads, SHAPE.head_dim, generator=torch.Generator().manual_seed(3))
    attended = await session.attention(1, q, end=end, precision=precision)
    scored = await session.score(0, q, end=end, precision=precision)
    best = await session.topk(0, q, 5, end=end, precision=precision)
    return [
        attended.out,
        attended.lse,
        scored.logits,
        best.logits,
        best.positions,
        *(await session.fetch(end=end, precision=precision)),
        torch.tensor([attended.fidelity.precision.keys_level, attended.fidelity.precision.values_level]),
        torch.tensor([attended.fidelity.score_stderr]),
    ]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def size(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"default/{name}/*/*/*.safetensors"))


async def until(condition: Any) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("codec", CODECS)
async def test_an_unused_session_is_cut_and_says_so(tmp_path: Path, codec: str) -> None:
    k, v = vectors(LENGTH, seed=1)
    async with serving(tmp_path, **SETTINGS) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        made = {}
        for name in ("cold", "pinned", "shared"):
            made[name] = await client.create_session(name, SHAPE, CODECS[codec], pinned=name == "pinned")
            for start, end in ((0, 100), (100, 101), (101, LENGTH)):
                await made[name].append(k[:, start:end], v[:, start:end])
        await made["shared"].fork("child", end=50)
        finest, coarse = await answers(made["cold"], Precision()), await answers(made["cold"], FLOOR)
        before = {name: size(tmp_path, name) for name in made}

    async with (
        serving(tmp_path, downgrade=DOWNGRADE, **SETTINGS) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        await until(lambda: size(tmp_path, "cold") < 0.95 * before["cold"])
        cold = await client.open_session("cold")
        for asked in (Precision(), FLOOR):
            assert_equal(await answers(cold, asked), coarse)
        with pytest.raises(FailedPrecondition):
            await answers(cold, Precision(required=True))
        with pytest.raises(FailedPrecondition):
            await cold.fetch_sketches()
        assert_equal(await answers(await client.open_session("pinned"), Precision()), finest)
        assert_equal(await answers(await client.open_session("shared"), Precision()), finest)

    async with serving(tmp_path, **SETTINGS) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        assert {name: size(tmp_path, name) for name in ("pinned", "shared")} == {
            name: before[name] for name in ("pinned", "shared")
        }
        cold = await client.open_session("cold")
        assert_equal(await answers(cold, Precision()), coarse)
        fork = await cold.fork("fork", end=300)
        await fork.append(k[:, :9], v[:, :9])
        assert_equal(await answers(fork, Precision(), 300), await answers(cold, FLOOR, 300))
        assert await cold.append(k[:, 100:101], v[:, 100:101], start=100) == LENGTH
        await cold.append(k[:, :9], v[:, :9])
        assert_equal(await answers(cold, Precision()), coarse)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output


async def test_a_server_that_forgets_what_was_cut_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = vectors(LENGTH, seed=1)
    async with (
        serving(tmp_path, downgrade=DOWNGRADE, **SETTINGS) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        cold = await client.create_session("cold", SHAPE, CODEC)
        await cold.append(k, v)
        coarse = await answers(cold, FLOOR)
        await until(lambda: any(tmp_path.glob("default/cold/*/merged/*")))
    monkeypatch.setattr(SessionState, "floor", (0, 0))
    async with serving(tmp_path, **SETTINGS) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(AssertionError):
            assert_equal(await answers(await client.open_session("cold"), Precision()), coarse)
