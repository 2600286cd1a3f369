import pytest
import torch

from kvstore_client import AppendBuffer, InvalidArgument, KVStoreError, Session
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .inputs import AppendLog, block
from .scripted import Failure, ScriptedServer


@pytest.fixture
def log(server: ScriptedServer) -> AppendLog:
    log = AppendLog(length=10)
    server.always("Append", log)
    return log


def sizes(log: AppendLog) -> list[tuple[int, int]]:
    return [(start, tokens) for start, (tokens, _, _) in sorted(log.commits.items())]


async def test_small_appends_are_gathered_until_there_is_no_room(session: Session, log: AppendLog):
    k, v = block(10)
    async with AppendBuffer(session, tokens=4) as buffer:
        for t in range(10):
            await buffer.append(k[:, t : t + 1], v[:, t : t + 1])
            assert buffer.pending <= 4
        assert sizes(log) == [(10, 4), (14, 4)]
    assert sizes(log) == [(10, 4), (14, 4), (18, 2)]
    assert torch.equal(log.stored(1, pb.KIND_KEYS), k[1])
    assert torch.equal(log.stored(0, pb.KIND_VALUES), v[0])


async def test_flush_makes_everything_durable_now(session: Session, log: AppendLog):
    buffer = AppendBuffer(session)
    assert await buffer.flush() == 10
    await buffer.append(*block(3))
    assert (log.length, buffer.pending) == (10, 3)
    assert await buffer.flush() == 13
    assert (log.length, buffer.pending) == (13, 0)


async def test_more_than_fits_goes_as_one_append(session: Session, log: AppendLog):
    buffer = AppendBuffer(session, tokens=4)
    await buffer.append(*block(1))
    await buffer.append(*block(9))
    await buffer.flush()
    assert sizes(log) == [(10, 1), (11, 9)]


async def test_the_caller_may_reuse_his_tensors(session: Session, log: AppendLog):
    k, v = block(2)
    kept = k.clone()
    buffer = AppendBuffer(session)
    await buffer.append(k, v)
    k.zero_()
    await buffer.flush()
    assert torch.equal(log.stored(0, pb.KIND_KEYS), kept[0])


async def test_an_error_takes_nothing_and_loses_nothing(session: Session, log: AppendLog):
    def full(_: pb.AppendHeader) -> None:
        raise Failure("RESOURCE_EXHAUSTED", reason="DISK_FULL")

    k, v = block(6)
    buffer = AppendBuffer(session, tokens=2)
    await buffer.append(k[:, :2], v[:, :2])
    log.before = full
    for _ in range(2):
        with pytest.raises(KVStoreError):
            await buffer.append(k[:, 2:3], v[:, 2:3])
        assert buffer.pending == 2
    log.before = lambda _: None
    await buffer.append(k[:, 2:3], v[:, 2:3])
    await buffer.append(k[:, 3:], v[:, 3:])
    await buffer.flush()
    assert torch.equal(log.stored(0, pb.KIND_KEYS), k[0])


async def test_an_append_of_unknown_outcome_is_repeated_as_it_was_not_doubled(
    server: ScriptedServer, session: Session, log: AppendLog
):
    """Committed, but the reply was lost; then more tokens come, and someone refreshes the handle."""

    def lose(_: pb.AppendHeader) -> None:
        raise Failure("INTERNAL")

    k, v = block(5)
    buffer = AppendBuffer(session, tokens=4)
    await buffer.append(k[:, :3], v[:, :3])
    log.after = lose
    with pytest.raises(KVStoreError):
        await buffer.flush()
    assert log.length == 13
    log.after = lambda _: None
    server.will("GetSession", pb.GetSessionResponse(session=inputs.session(length=13)))
    await session.refresh()
    await buffer.append(k[:, 3:], v[:, 3:])
    await buffer.flush()
    assert torch.equal(log.stored(0, pb.KIND_KEYS), k[0])
    assert sizes(log) == [(10, 3), (13, 2)]


async def test_what_does_not_fit_the_session_is_refused_at_once(session: Session):
    buffer = AppendBuffer(session)
    k, v = block(2)
    with pytest.raises(InvalidArgument, match="dtype"):
        await buffer.append(k.float(), v)
    assert buffer.pending == 0
    with pytest.raises(ValueError, match="tokens 0"):
        AppendBuffer(session, tokens=0)
