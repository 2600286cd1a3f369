"""Several replicas behind one client: whichever fails costs a retry at another, and sessions keep to their replica."""

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, Session
from kvstore_client.failover import FailoverTransport
from kvstore_client.retry import SYSTEM_CLOCK, Clock
from kvstore_client.transport import GrpcTransport
from kvstore_proto.v1 import kvstore_pb2 as pb

from . import inputs
from .attending import GOING_AWAY, Attending
from .conftest import FAST
from .scripted import AtFirstMessage, Call, Failure, ScriptedServer, scripted_server

Pair = tuple[ScriptedServer, ScriptedServer]


@pytest.fixture
async def pair() -> AsyncGenerator[Pair]:
    async with scripted_server() as one, scripted_server() as other:
        for server in (one, other):
            server.always("GetServerInfo", inputs.server_info())
            server.always("GetSession", pb.GetSessionResponse(session=inputs.session(length=10)))
            server.always("UpdateSession", pb.UpdateSessionResponse(session=inputs.session()))
        yield one, other


@pytest.fixture
async def client(pair: Pair) -> AsyncGenerator[AsyncKVStoreClient]:
    async with AsyncKVStoreClient([server.target for server in pair], retry=FAST) as client:
        yield client


async def by_preference(session: Session, pair: Pair) -> Pair:
    """The replica that this session prefers, then the other."""
    before = len(pair[0].of("UpdateSession"))
    await session.update(pinned=True)
    return pair if len(pair[0].of("UpdateSession")) > before else (pair[1], pair[0])


async def test_a_session_keeps_to_one_replica_whichever_client_asks(client: AsyncKVStoreClient, pair: Pair) -> None:
    preferred, other = await by_preference(await client.open_session("book"), pair)
    async with AsyncKVStoreClient([server.target for server in reversed(pair)]) as second:
        session = await second.open_session("book")
        for _ in range(5):
            await session.update(pinned=True)
    assert (len(preferred.of("UpdateSession")), len(other.of("UpdateSession"))) == (6, 0)


@pytest.mark.parametrize("failure", [None, "UNAVAILABLE"])
async def test_a_replica_that_is_gone_or_drains_costs_a_retry_at_another(
    client: AsyncKVStoreClient, pair: Pair, failure: str | None
) -> None:
    session = await client.open_session("book")
    preferred, other = await by_preference(session, pair)
    if failure is None:
        await preferred.stop()
    else:
        preferred.always("UpdateSession", Failure(failure))
    for _ in range(5):
        await session.update(pinned=True)
    assert len(other.of("UpdateSession")) == 5
    assert len(preferred.of("UpdateSession")) == (1 if failure is None else 2)


async def test_an_append_goes_on_at_another_replica(client: AsyncKVStoreClient, pair: Pair) -> None:
    session = await client.open_session("book")
    preferred, other = await by_preference(session, pair)
    log = inputs.AppendLog(10)
    preferred.always("Append", Failure("UNAVAILABLE"))
    other.always("Append", log)
    assert await session.append(*inputs.block(3)) == 13


async def test_attend_steps_go_on_at_another_replica(client: AsyncKVStoreClient, pair: Pair) -> None:
    session = await client.open_session("book")
    preferred, other = await by_preference(session, pair)
    one, second = Attending(), Attending()
    preferred.always("Attend", one)
    other.always("Attend", second)
    await session.attend(1, inputs.query())
    await preferred.stop()
    assert torch.equal((await session.attend(1, inputs.query()))[0], torch.ones(1, 4, 32))
    assert (len(one.steps), len(second.steps)) == (1, 1)


async def test_a_stream_of_a_draining_replica_is_taken_up_at_another(client: AsyncKVStoreClient, pair: Pair) -> None:
    session = await client.open_session("book")
    preferred, other = await by_preference(session, pair)
    going, second = Attending(lambda step: [GOING_AWAY, *Attending().on_step(step)]), Attending()
    preferred.will("Attend", going)
    preferred.always("Attend", AtFirstMessage(Failure("UNAVAILABLE")))
    other.always("Attend", second)
    for _ in range(3):
        await session.attend(0, inputs.query())
    assert (len(going.steps), len(second.steps)) == (1, 2)


async def test_a_replica_that_says_nothing_leaves_time_to_ask_another(client: AsyncKVStoreClient, pair: Pair) -> None:
    async def never(_: Call) -> None:
        await asyncio.Event().wait()

    session = await client.open_session("book")
    preferred, other = await by_preference(session, pair)
    preferred.always("UpdateSession", never)
    began = time.monotonic()
    await session.update(pinned=True, timeout=2)
    await session.update(pinned=True, timeout=2)
    assert time.monotonic() - began < 2
    assert len(other.of("UpdateSession")) == 2


class SetClock:
    """Time as the test sets it; waiting is real."""

    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        await SYSTEM_CLOCK.sleep(seconds)


def over(pair: Pair, clock: Clock) -> FailoverTransport:
    return FailoverTransport({server.target: GrpcTransport(server.target) for server in pair}, clock)


async def test_a_replica_that_failed_is_asked_again_ever_later_and_is_preferred_once_it_answers(pair: Pair) -> None:
    clock = SetClock()
    async with AsyncKVStoreClient("", retry=FAST, transport=over(pair, clock)) as client:
        session = await client.open_session("book")
        preferred, other = await by_preference(session, pair)
        preferred.will("UpdateSession", *[Failure("UNAVAILABLE")] * 3)
        asked = []
        for seconds in (0.0, 0.9, 0.2, 1.8, 0.3, 3.9, 0.2, 0.0):
            clock.time += seconds
            before = len(preferred.of("UpdateSession"))
            await session.update(pinned=True)
            asked.append(len(preferred.of("UpdateSession")) - before)
    assert asked == [1, 0, 1, 0, 1, 0, 1, 1]
    assert len(other.of("UpdateSession")) == 6


async def test_when_all_replicas_failed_the_one_that_rested_longest_is_asked(pair: Pair) -> None:
    async with AsyncKVStoreClient("", retry=FAST, transport=over(pair, SetClock())) as client:
        session = await client.open_session("book")
        for server in pair:
            server.will("UpdateSession", Failure("UNAVAILABLE"))
        await session.update(pinned=True)
    assert sorted(len(server.of("UpdateSession")) for server in pair) == [1, 2]


def test_no_address_is_refused() -> None:
    with pytest.raises(ValueError, match="names no server"):
        AsyncKVStoreClient([])
