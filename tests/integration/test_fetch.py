"""What comes in pieces is what would come at once, and no piece is made before somebody reads those before it."""

import asyncio
from pathlib import Path

import grpc
import pytest
import torch
from torch import Tensor

from kvstore_client import AsyncKVStoreClient, Session, Sketches
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import RAW, Affine, CodecSpec, LayerOverride, Matryoshka, ModelShape, Raw, Rotated
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreServiceStub

from ..running import serving

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=2, head_dim=64, dtype="float32", sm_scale=0.125)
CODECS = {
    "raw": RAW,
    "rotated": CodecSpec(keys=Rotated(planes=3), values=Rotated(planes=3)),
    "mixed": CodecSpec(
        keys=Rotated(planes=3), values=Raw(), overrides=(LayerOverride(layers=(-1,), keys=Raw(), values=Affine()),)
    ),
    "own bases": CodecSpec(keys=Matryoshka(), values=Matryoshka(), fit_tokens=512),
}
FRAME_BYTES = 5 * 2 * 64 * 4 + 7
"""Five float32 tokens, and some."""


async def fetched(session: Session) -> list[Tensor]:
    found = [*(await session.fetch()), *(await session.fetch(start=3, end=611, dtype=torch.float16))]
    return found + tensors(await session.fetch_sketches()) + tensors(await session.fetch_sketches(start=2, end=513))


def tensors(sketches: Sketches) -> list[Tensor]:
    return [each for part in sketches.parts.values() for each in of_kind(part)] + of_fit(sketches)


def of_kind(part: KindRows) -> list[Tensor]:
    return [part.rows] if part.signs is None else [part.rows, part.signs.words, part.signs.scales]


def of_fit(sketches: Sketches) -> list[Tensor]:
    return [] if sketches.fit is None else list(sketches.fit.tensors.values())


@pytest.mark.parametrize("name", CODECS)
async def test_small_pieces_hold_what_large_ones_do(tmp_path: Path, name: str) -> None:
    made, found = torch.Generator().manual_seed(0), list[list[Tensor]]()
    for limits in ({}, {"frame_bytes_max": FRAME_BYTES}):
        async with serving(tmp_path, limits=limits) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
            session = await client.create_session("s", SHAPE, CODECS[name])
            if not session.length:
                await session.append(*torch.randn(2, 2, 620, 2, 64, generator=made))
            found.append(await fetched(session))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


async def test_what_is_not_read_is_not_decoded(tmp_path: Path) -> None:
    limits = {"frame_bytes_max": 1 << 20}
    async with serving(tmp_path, limits=limits) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(*torch.randn(2, 2, 32_768, 2, 64))

        def runs() -> float:
            return server.telemetry.registry.get_sample_value("kvstore_device_runs") or 0

        before = runs()
        await session.fetch()
        assert runs() - before == 32  # pieces of two frames
        options = [("grpc.max_receive_message_length", 2 << 20), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            before = runs()
            call = KVStoreServiceStub(channel).Fetch(pb.FetchRequest(session="s", token_end=32_768, decoded=True))
            await call.read()
            await asyncio.sleep(0.5)
            assert runs() - before <= 3
            call.cancel()
