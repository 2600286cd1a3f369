"""The Attend stream over the wire: binds, steps in any order, errors that stay with their step, drain."""

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreServiceStub
from kvstore_proto.varint import varint
from kvstore_server.app import Server
from kvstore_server.rpc.attend_stream import AttendStream

from ..running import serving

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=2, head_dim=32, dtype="float32", sm_scale=0.2)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    limits: dict[str, object] = {"attend_handles_max": 3, "attend_inflight_steps_max": 2}
    async with serving(tmp_path, limits=limits) as server:
        async with AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
            for name in ("a", "b"):
                session = await client.create_session(name, SHAPE, RAW)
                await session.append(torch.randn(1, 8, 1, 32), torch.randn(1, 8, 1, 32))
        yield server


@pytest.fixture
async def call(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield KVStoreServiceStub(channel).Attend()


def bind(handle: int, session: str, **more: Any) -> pb.AttendRequest:
    return pb.AttendRequest(bind=pb.AttendBind(handle=handle, session=session, **more))


def step(request_id: int, *items: tuple[int, int, int], timeout_ms: int = 5000, **more: Any) -> pb.AttendRequest:
    """`items` are (handle, end, rows)."""
    rows = sum(item[2] for item in items)
    q = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[rows, 2, 32], data=torch.ones(rows, 2, 32).numpy().tobytes())
    made = [pb.AttendStep.Item(handle=handle, end=end, rows=count) for handle, end, count in items]
    return pb.AttendRequest(
        step=pb.AttendStep(**{"request_id": request_id, "timeout_ms": timeout_ms, "items": made, "q": q, **more})
    )


async def ask(call: Any, request: pb.AttendRequest) -> pb.AttendResponse:
    await call.write(request)
    return await asyncio.wait_for(call.read(), 10)


async def test_one_step_carries_rows_of_several_sessions(call: Any) -> None:
    for handle, name in ((1, "a"), (2, "b")):
        bound = await ask(call, bind(handle, name))
        assert (bound.handle, bound.bound.session.length) == (handle, 8)
    result = (await ask(call, step(7, (1, 8, 1), (2, 3, 2)))).result
    assert list(result.out.shape) == [3, 2, 32]
    assert list(result.lse.shape) == [3, 2]
    assert (result.lse_base, result.lse_layout) == (pb.LSE_BASE_E, pb.LSE_LAYOUT_TOKEN_MAJOR)
    assert [item.length for item in result.items] == [8, 8]
    natural = torch.frombuffer(bytearray(result.lse.data), dtype=torch.float32)
    other = (await ask(call, step(8, (1, 8, 1), (2, 3, 2), lse_base=pb.LSE_BASE_2))).result
    assert other.lse_base == pb.LSE_BASE_2
    torch.testing.assert_close(torch.frombuffer(bytearray(other.lse.data), dtype=torch.float32), natural * 1.442695)


async def test_items_before_one_that_is_refused_are_not_answered_for_nobody(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    answer_of = AttendStream._answer_of  # pyright: ignore[reportPrivateUsage]

    def noted(self: AttendStream, *arguments: Any) -> Any:
        begun.append(answer_of(self, *arguments))
        return begun[-1]

    monkeypatch.setattr(AttendStream, "_answer_of", noted)
    for handle, name in ((1, "a"), (2, "b")):
        await ask(call, bind(handle, name))
    assert not (await ask(call, step(6, (2, 8, 1)))).error.code
    refused = await ask(call, step(7, (1, 9_999, 1), (2, 8, 1), debias=7.0))
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert len(begun) == 2, "the second item of the second step is refused"
    assert begun[-1].cancelled(), "the item of a session that had to be loaded"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (bind(9, "nobody"), grpc.StatusCode.NOT_FOUND),
        (bind(9, "../a"), grpc.StatusCode.INVALID_ARGUMENT),
        (bind(9, "a", generation="7"), grpc.StatusCode.ABORTED),
        (step(5, (4, 8, 1)), grpc.StatusCode.NOT_FOUND),
        (step(5, (1, 9, 1)), grpc.StatusCode.OUT_OF_RANGE),
        (step(5), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 0)), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), layer=1), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), timeout_ms=0), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), timeout_ms=2**31), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), head_offset=1), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), debias=1.5), grpc.StatusCode.INVALID_ARGUMENT),
        (step(5, (1, 8, 1), lse_base=9), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_an_error_answers_its_step_and_the_stream_goes_on(
    call: Any, request_: pb.AttendRequest, code: grpc.StatusCode
) -> None:
    await ask(call, bind(1, "a"))
    refused = await ask(call, request_)
    assert refused.error.code == code.value[0]
    assert len(refused.error.details) >= 1
    assert (await ask(call, step(6, (1, 8, 1)))).HasField("result")


async def test_a_step_that_asks_the_same_again_is_still_looked_at_for_what_is_not_finite(call: Any) -> None:
    await ask(call, bind(1, "a"))
    for request_id in (1, 2):
        assert (await ask(call, step(request_id, (1, 8, 1)))).HasField("result")
    bad = step(3, (1, 8, 1))
    bad.step.q.data = torch.full((1, 2, 32), torch.nan).numpy().tobytes()
    refused = await ask(call, bad)
    assert (refused.request_id, refused.error.code) == (3, grpc.StatusCode.INVALID_ARGUMENT.value[0])
    bad.step.q.data = b"short"
    assert (await ask(call, bad)).error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    good = await ask(call, step(4, (1, 8, 1)))
    assert (good.request_id, good.HasField("result")) == (4, True), "each was answered once"


async def test_handles_on_one_stream_are_bounded(call: Any) -> None:
    for handle in range(3):
        assert (await ask(call, bind(handle, "a"))).HasField("bound")
    refused = await ask(call, bind(3, "a"))
    assert refused.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert (await ask(call, bind(0, "b"))).HasField("bound"), "a handle that is there may be bound again"


async def test_a_step_whose_turn_comes_too_late_answers_deadline_exceeded(server: Server, call: Any) -> None:
    await ask(call, bind(1, "a"))
    blocked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def block() -> None:
        asyncio.run_coroutine_threadsafe(blocked.wait(), loop).result(5)

    running = asyncio.create_task(server._engine.run(block, loop.time() + 60))
    await asyncio.sleep(0.05)
    late = await ask(call, step(1, (1, 8, 1), timeout_ms=50))
    assert late.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    blocked.set()
    await running
    assert (await ask(call, step(2, (1, 8, 1)))).HasField("result")


async def test_a_draining_server_says_so_answers_what_it_has_and_ends_the_stream(server: Server, call: Any) -> None:
    await ask(call, bind(1, "a"))
    await call.write(step(1, (1, 8, 1)))
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(server.drain())
    answers = [await asyncio.wait_for(call.read(), 10) for _ in range(3)]
    assert {answers[0].WhichOneof("body"), answers[1].WhichOneof("body")} == {"going_away", "result"}
    assert answers[2] == grpc.aio.EOF
    assert await draining
    server.drain = lambda: asyncio.sleep(0, True)  # type: ignore[method-assign]


async def test_bytes_that_are_no_message_end_a_stream_with_a_reason(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call: Any = channel.stream_stream("/kvstore_proto.v1.KVStoreService/Attend")()
        await call.write(bind(1, "a").SerializeToString())
        assert pb.AttendResponse.FromString(await asyncio.wait_for(call.read(), 10)).bound.session.length == 8
        await call.write(step(7, (1, 8, 1)).SerializeToString()[:-1])
        with pytest.raises(grpc.aio.AioRpcError, match="not a message of this method") as refused:
            await asyncio.wait_for(call.read(), 10)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_message_are_an_invalid_argument(server: Server) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        garbage = channel.unary_unary("/kvstore_proto.v1.KVStoreService/GetSession")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await garbage(b"\xff\xff\xff")
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_nothing_is_kept_of_fields_that_no_version_knows(call: Any) -> None:
    await ask(call, bind(1, "a"))
    size, steps = 1 << 20, 20
    tracemalloc.start()
    try:
        for number in range(steps):
            unknown = bytes([15 << 3 | 2]) + varint(size) + bytes([number]) * size
            answer = await ask(call, step(number, (1, 8, 1), precision=pb.Precision.FromString(unknown)))
            assert answer.WhichOneof("body") == "result"
        assert tracemalloc.get_traced_memory()[0] < steps * size / 4
    finally:
        tracemalloc.stop()
