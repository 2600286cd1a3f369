import asyncio

import pytest
import torch

from kvstore_client import (
    AlreadyExists,
    AsyncKVStoreClient,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    Session,
)
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .inputs import SHAPE, AppendLog, block
from .scripted import AtFirstMessage, Call, Failure, ScriptedServer


@pytest.fixture
def log(server: ScriptedServer) -> AppendLog:
    log = AppendLog(length=10)
    server.always("Append", log)
    return log


def headers(server: ScriptedServer) -> list[tuple[int, int]]:
    return [(call.requests[0].header.start, call.requests[0].header.tokens) for call in server.of("Append")]


def limited(server: ScriptedServer, **limits: int) -> None:
    server.always("GetServerInfo", inputs.server_info(**limits))


async def test_an_append_is_one_header_and_frames_that_hold_the_bytes(
    server: ScriptedServer, session: Session, log: AppendLog
):
    k, v = block(7)
    assert await session.append(k, v) == 17
    assert session.length == 17
    header = server.of("Append")[0].requests[0].header
    assert header == pb.AppendHeader(
        session="book",
        generation="1",
        start=10,
        tokens=7,
        bytes=7 * SHAPE.raw_bytes_per_token,
        encoding=pb.ENCODING_RAW,
    )
    assert torch.equal(log.stored(1, pb.KIND_KEYS), k[1])
    assert torch.equal(log.stored(0, pb.KIND_VALUES), v[0])


async def test_a_large_append_is_cut_at_the_server_s_bytes_into_atomic_ones(
    server: ScriptedServer, session: Session, log: AppendLog
):
    limited(server, append_bytes_max=3 * SHAPE.raw_bytes_per_token + 1)
    k, v = block(7)
    assert await session.append(k, v) == 17
    assert headers(server) == [(10, 3), (13, 3), (16, 1)]
    assert torch.equal(log.stored(0, pb.KIND_KEYS), k[0])


async def test_a_large_append_is_cut_at_the_server_s_tokens(server: ScriptedServer, session: Session, log: AppendLog):
    limited(server, append_tokens_max=5)
    await session.append(*block(11))
    assert headers(server) == [(10, 5), (15, 5), (20, 1)]


async def test_a_token_larger_than_an_append_is_refused_with_the_limit(server: ScriptedServer, session: Session):
    limited(server, append_bytes_max=100)
    with pytest.raises(InvalidArgument, match="append_bytes_max") as caught:
        await session.append(*block(1))
    assert caught.value.facts["limit"] == "100"


async def test_the_next_piece_is_sent_while_the_last_is_committed(
    server: ScriptedServer, session: Session, log: AppendLog
):
    limited(server, append_tokens_max=4)
    second = asyncio.Event()

    async def slow(call: Call) -> pb.AppendResponse:
        reply = await log(call)
        if call.requests[0].header.start == 10:
            await asyncio.wait_for(second.wait(), 10)
        second.set()
        return reply

    server.always("Append", slow)
    assert await session.append(*block(12)) == 22


async def test_a_server_that_wants_one_piece_after_another_gets_them_so(server: ScriptedServer, session: Session):
    """One that does not have the piece before, which went to another server, say."""
    limited(server, append_tokens_max=4)
    log, under_way = AppendLog(length=10), 0

    async def alone(call: Call) -> pb.AppendResponse:
        nonlocal under_way
        start = call.requests[0].header.start
        if under_way:
            raise Failure("OUT_OF_RANGE", facts={"length": str(log.length)})
        under_way += 1
        await asyncio.sleep(0.05 if start == 10 else 0)
        under_way -= 1
        return await log(call)

    server.always("Append", alone)
    assert await session.append(*block(20)) == 30
    assert [start for start, _ in headers(server)][-4:] == [14, 18, 22, 26]


async def test_nothing_to_append_asks_nothing(server: ScriptedServer, session: Session):
    assert await session.append(*block(0)) == 10
    assert server.of("Append") == []


async def test_a_lost_reply_is_settled_by_the_same_append(server: ScriptedServer, session: Session, log: AppendLog):
    lost = iter([True])

    def after(_: pb.AppendHeader) -> None:
        if next(lost, False):
            raise Failure("UNAVAILABLE")

    log.after = after
    assert await session.append(*block(3)) == 13
    assert headers(server) == [(10, 3), (10, 3)]
    assert log.length == 13


async def test_a_replay_from_the_start_counts_what_is_there_as_done(
    server: ScriptedServer, session: Session, log: AppendLog
):
    limited(server, append_tokens_max=4)
    k, v = block(10)
    await session.append(k[:, :8], v[:, :8])
    assert await session.append(k, v, start=10) == 20
    assert headers(server)[2:] == [(10, 4), (14, 4), (18, 2)]


async def test_other_bytes_at_a_position_are_already_exists(session: Session, log: AppendLog):
    await session.append(*block(4))
    with pytest.raises(AlreadyExists):
        await session.append(*block(4, seed=1), start=10)
    assert session.length == 14


async def test_an_append_resumes_at_the_length_the_server_names(
    server: ScriptedServer, client: AsyncKVStoreClient, session: Session, log: AppendLog
):
    limited(server, append_tokens_max=4)
    k, v = block(12)

    def stand_back(header: pb.AppendHeader) -> None:
        if header.start == 18:
            log.before = lambda _: None
            log.length = 14
            del log.commits[14]
            raise Failure("OUT_OF_RANGE", facts={"length": "14"})

    log.before = stand_back
    assert await session.append(k, v) == 22
    assert headers(server) == [(10, 4), (14, 4), (18, 4), (18, 4), (14, 4), (18, 4)], "sent ahead, alone, and resumed"
    assert torch.equal(log.stored(0, pb.KIND_KEYS), k[0])


async def test_tokens_missing_before_the_start_are_out_of_range(session: Session, log: AppendLog):
    log.length = 7
    with pytest.raises(OutOfRange) as caught:
        await session.append(*block(2))
    assert caught.value.length == 7


async def test_a_server_that_always_sends_back_is_given_up(server: ScriptedServer, session: Session):
    limited(server, append_tokens_max=1)

    async def back(call: Call) -> pb.AppendResponse:
        if call.requests[0].header.start == 11:
            raise Failure("OUT_OF_RANGE", facts={"length": "10"})
        return pb.AppendResponse(length=11)

    server.always("Append", back)
    with pytest.raises(OutOfRange):
        await session.append(*block(2))


async def test_after_an_error_the_length_says_what_is_durable(server: ScriptedServer, session: Session, log: AppendLog):
    limited(server, append_tokens_max=2)

    def full(header: pb.AppendHeader) -> None:
        if header.start == 14:
            raise Failure("RESOURCE_EXHAUSTED", reason="DISK_FULL")

    log.before = full
    k, v = block(6)
    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        await session.append(k, v)
    assert session.length == 14
    log.before = lambda _: None
    assert await session.append(k[:, 4:], v[:, 4:]) == 16


async def test_an_append_that_is_refused_at_its_header_reports_the_server_s_reason(
    server: ScriptedServer, client: AsyncKVStoreClient
):
    """The server answers while megabytes are still to be sent."""
    shape = SHAPE.model_copy(update={"layers": 8, "kv_heads": 8, "query_heads": 8, "head_dim": 256})
    server.always("GetServerInfo", inputs.server_info())
    server.will("CreateSession", pb.CreateSessionResponse(session=inputs.session(shape=shape)))
    server.will("Append", *(AtFirstMessage(Failure("FAILED_PRECONDITION", reason="NOT_THIS")) for _ in range(12)))
    session = await client.create_session("book", shape)
    for _ in range(12):
        with pytest.raises(FailedPrecondition) as caught:
            await session.append(*block(200, shape))
        assert caught.value.reason == "NOT_THIS"


async def test_appends_of_one_handle_go_one_after_the_other(server: ScriptedServer, session: Session, log: AppendLog):
    parts = [block(3, seed=n) for n in range(4)]
    assert sorted(await asyncio.gather(*(session.append(*part) for part in parts))) == [13, 16, 19, 22]
    assert torch.equal(log.stored(0, pb.KIND_KEYS), torch.cat([k[0] for k, _ in parts]))


async def test_a_deadline_bounds_each_atomic_append(server: ScriptedServer, session: Session):
    async def never(_: object) -> None:
        await asyncio.Event().wait()

    server.always("Append", never)
    with pytest.raises(DeadlineExceeded):
        await session.append(*block(1), timeout=0.1)
    assert session.length == 10


async def test_info_does_not_move_where_the_next_append_starts(
    server: ScriptedServer, session: Session, log: AppendLog
):
    """After an unknown outcome the same call must settle it, even if someone looked at the session in between."""

    def lose(_: pb.AppendHeader) -> None:
        raise Failure("INTERNAL")

    log.after = lose
    with pytest.raises(Exception, match="INTERNAL"):
        await session.append(*block(3))
    log.after = lambda _: None
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(length=13)))
    assert (await session.info()).length == 13
    assert await session.append(*block(3)) == 13
    assert log.length == 13
