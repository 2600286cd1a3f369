"""Sampled answers, compared with vectors that were kept exactly."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.named import codec_named, shape_named
from kvstore_server.app import Server
from kvstore_server.monitoring.history import Moment

from ..running import serving

SHAPE = shape_named("1x2x4x64")
ALL = {"sample_share": 1.0, "exact_bytes_max": 1 << 20}


def vectors(tokens: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 1, tokens, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    return k, v


async def sampled(server: Server, name: str, count: int) -> float:
    """The sum of a quality histogram once it has so many observations."""
    async with asyncio.timeout(20):
        while (now := Moment.now(server.telemetry.registry)).total(f"{name}_count") < count:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return now.total(f"{name}_sum")


async def ask(server: Server, codec: str, q: Tensor, head_offset: int = 0) -> None:
    async with AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session(codec.replace(":", "-"), SHAPE, codec_named(codec))
        k, v = vectors(600)
        await session.append(k[:, :400], v[:, :400])
        await session.append(k[:, 400:], v[:, 400:])
        await session.attend(0, q, head_offset=head_offset)
        await server.sessions.quality.settle()  # one comparison at a time
        await session.topk(0, q, 20, head_offset=head_offset)


async def test_exact_sessions_have_no_error_and_coarse_ones_have_one(tmp_path: Path) -> None:
    q = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    async with serving(tmp_path, quality=ALL) as server:
        await ask(server, "raw", q)
        assert await sampled(server, "kvstore_quality_relative_error", 1) < 1e-5
        assert await sampled(server, "kvstore_quality_top_k_recall", 1) == 1
        assert server.sessions.quality.kept_bytes == 2 * 600 * 2 * 64 * 2
        await ask(server, "rotated:2", q)
        assert 0.05 < await sampled(server, "kvstore_quality_relative_error", 2) < 1
        assert 1.3 < await sampled(server, "kvstore_quality_top_k_recall", 2) < 1.95


async def test_heads_of_a_part_of_the_model_are_compared_with_their_own(tmp_path: Path) -> None:
    async with serving(tmp_path, quality=ALL) as server:
        await ask(server, "raw", torch.randn(1, 2, 64), head_offset=2)
        assert await sampled(server, "kvstore_quality_relative_error", 1) < 1e-5
        assert await sampled(server, "kvstore_quality_top_k_recall", 1) == 1


@pytest.mark.parametrize("quality", [{"sample_share": 0.0}, {"exact_bytes_max": 0}, {"exact_bytes_max": 1000}])
async def test_nothing_is_kept_beyond_the_bound(tmp_path: Path, quality: dict[str, object]) -> None:
    async with serving(tmp_path, quality=quality) as server:
        await ask(server, "raw", torch.randn(1, 4, 64))
        assert server.sessions.quality.kept_bytes == 0


async def test_what_the_client_encoded_is_not_compared(tmp_path: Path) -> None:
    async with serving(tmp_path, quality=ALL) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE)
        k, v = vectors(600)
        await session.append(k[:, :400], v[:, :400])
        assert server.sessions.quality.kept_sessions == 1
        await session.append(k[:, 400:], v[:, 400:], encode=True)
        assert server.sessions.quality.kept_sessions == 0
