"""Clients that do not read, do not write, or are not there any more: what they held is given to others soon."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreServiceStub
from kvstore_server.app import Server

from ..faults.proxy import proxied
from ..running import serving

SHAPE = ModelShape(layers=2, kv_heads=4, query_heads=4, head_dim=128, dtype="float32", sm_scale=0.1)
TOKENS = 4096  # 32 MiB
LIMITS: dict[str, object] = {
    "write_seconds_max": 1,
    "read_seconds_max": 1,
    "keepalive_seconds": 1,
    "keepalive_timeout_seconds": 1,
}
SOON_SECONDS = 15.0
Stub = Any


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(tmp_path, limits=LIMITS) as server:
        async with AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
            session = await client.create_session("s", SHAPE, RAW)
            await session.append(*torch.randn(2, 2, TOKENS, 4, 128))
        await until(lambda: not held(server))  # an append keeps its place until its rows are in memory
        yield server


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Stub]:
    options = [("grpc.max_receive_message_length", 17 << 20), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
        yield KVStoreServiceStub(channel)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_SECONDS):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def held(server: Server) -> dict[str, float]:
    return {name: pool.held for name, pool in server.admission.pools.items() if pool.held}


async def test_a_fetch_that_is_not_read_gives_its_place_back_when_its_deadline_has_passed(
    server: Server, stub: Stub
) -> None:
    call = stub.Fetch(pb.FetchRequest(session="s", token_end=TOKENS), timeout=3)
    await call.read()
    assert held(server) == {"fetches": 1}
    await until(lambda: not held(server))


async def test_a_fetch_without_a_deadline_that_is_not_read_keeps_no_more_than_its_place(
    server: Server, stub: Stub
) -> None:
    call = stub.Fetch(pb.FetchRequest(session="s", token_end=TOKENS))
    await call.read()
    await asyncio.sleep(3)
    assert held(server) == {"fetches": 1}
    call.cancel()
    await until(lambda: not held(server))


async def test_a_client_that_does_not_read_does_not_keep_a_server_from_stopping(server: Server, stub: Stub) -> None:
    call = stub.Fetch(pb.FetchRequest(session="s", token_end=TOKENS))
    await call.read()
    await asyncio.sleep(2)
    assert held(server) == {"fetches": 1}
    async with asyncio.timeout(SOON_SECONDS):
        assert await server.drain()


async def test_a_fetch_that_is_read_slowly_but_steadily_is_answered(stub: Stub) -> None:
    parts = 0
    async for _ in stub.Fetch(pb.FetchRequest(session="s", token_end=TOKENS)):
        await asyncio.sleep(0.1)
        parts += 1
    assert parts > 8


async def test_attend_answers_that_are_not_read_do_not_pile_up(server: Server, stub: Stub) -> None:
    call, rows, sent = stub.Attend(), 256, 0
    await call.write(pb.AttendRequest(bind=pb.AttendBind(handle=1, session="s")))
    q = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[rows, 4, 128], data=bytes(rows * 4 * 128 * 4))
    item = pb.AttendStep.Item(handle=1, end=8, rows=rows)

    async def send() -> None:
        nonlocal sent
        while True:
            sent += 1
            step = pb.AttendStep(request_id=sent, timeout_ms=10_000, items=[item], q=q)
            await call.write(pb.AttendRequest(step=step))

    most, sending = 0.0, asyncio.create_task(send())
    async with asyncio.timeout(SOON_SECONDS):
        while "steps" in held(server) or not most:
            await asyncio.sleep(0.005)
            most = max(most, server.admission.pools["steps"].held)
    sending.cancel()
    call.cancel()
    await until(lambda: not held(server))
    limit = server.settings.limits.attend_inflight_steps_max
    print(f"{sent} steps were sent and none read: {most:.0f} held at most")
    assert 1 < most <= 2 * limit + 1


async def test_an_append_whose_frames_do_not_come_ends(server: Server, stub: Stub) -> None:
    header = pb.AppendHeader(session="s", start=TOKENS, tokens=8, bytes=2 * 2 * 8 * 4 * 128 * 4)
    generation = (await stub.GetSession(pb.GetSessionRequest(name="s"))).session.generation
    header.generation, header.encoding = generation, pb.ENCODING_RAW
    call = stub.Append()
    await call.write(pb.AppendRequest(header=header))
    await until(lambda: held(server) == {"calls": 1, "appends": 1})
    with pytest.raises(grpc.aio.AioRpcError, match="did not come within 1 s") as ended:
        await call
    assert ended.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not held(server))


async def test_a_client_that_is_cut_off_without_a_word_gives_its_places_back(server: Server) -> None:
    async with (
        proxied(f"127.0.0.1:{server.port}") as proxy,
        grpc.aio.insecure_channel(proxy.target) as channel,
    ):
        call = KVStoreServiceStub(channel).Attend()
        await call.write(pb.AttendRequest(bind=pb.AttendBind(handle=1, session="s")))
        await call.read()
        assert held(server) == {"attend_streams": 1}
        proxy.lose_answers()
        await until(lambda: not held(server))


async def test_calls_survive_the_age_of_their_connections(tmp_path: Path) -> None:
    limits = {
        "connection_seconds_max": 1,
        "attend_stream_seconds_max": 1,
        "deadline_default_seconds": 1,
        "deadline_seconds_max": 4,
        "connection_grace_seconds": 5,
    }
    async with (
        serving(tmp_path, limits=limits) as server,
        proxied(f"127.0.0.1:{server.port}") as proxy,
        AsyncKVStoreClient(proxy.target) as client,
    ):
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(*torch.randn(2, 2, 8, 4, 128))
        began, loop = asyncio.get_running_loop().time(), asyncio.get_running_loop()
        while loop.time() < began + 5:
            await session.attend(0, torch.randn(1, 4, 128), end=8, timeout=3)
            await client.server_info(timeout=3)
            await asyncio.sleep(0.005)
        assert proxy.connections >= 3


async def test_messages_are_not_compressed_either_way(server: Server) -> None:
    target, request = f"127.0.0.1:{server.port}", pb.GetServerInfoRequest()
    async with grpc.aio.insecure_channel(target, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await KVStoreServiceStub(channel).CreateSession(pb.CreateSessionRequest(name="x" * 10_000))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with grpc.aio.insecure_channel(target) as channel:
        call = KVStoreServiceStub(channel).GetServerInfo(request)
        await call
        assert dict(await call.initial_metadata()).get("grpc-encoding", "identity") == "identity"
