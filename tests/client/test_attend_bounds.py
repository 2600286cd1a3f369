"""What bounds an Attend stream: steps in flight, sessions bound, a server that does not read."""

import asyncio

import pytest

from kvstore_client import (
    AsyncKVStoreClient,
    DeadlineExceeded,
    Session,
    attend,
)
from kvstore_proto.v1 import kvstore_pb2 as pb

from .attending import Attending, answer, bound, opened, until
from .inputs import query
from .scripted import ScriptedServer


async def test_no_more_steps_are_in_flight_than_a_server_takes(session: Session, attending: Attending):
    held: list[pb.AttendStep] = []
    most = 0

    def hold(step: pb.AttendStep):  # type: ignore[no-untyped-def]
        nonlocal most
        held.append(step)
        most = max(most, len(held))
        if len(held) < attend.INFLIGHT_MAX:
            return []
        return [answer(held.pop()) for _ in range(attend.INFLIGHT_MAX)]

    attending.on_step = hold
    await asyncio.gather(*(session.attend(0, query()) for _ in range(2 * attend.INFLIGHT_MAX)))
    assert most == attend.INFLIGHT_MAX


async def test_waiting_for_a_free_slot_counts_against_the_deadline(
    session: Session, attending: Attending, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attend, "INFLIGHT_MAX", 1)
    attending.on_step = lambda _: []
    outcomes = await asyncio.gather(
        *(session.attend(0, query(), timeout=0.1) for _ in range(3)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [DeadlineExceeded] * 3


async def test_a_stream_with_too_many_sessions_is_followed_by_a_fresh_one(
    server: ScriptedServer, client: AsyncKVStoreClient, attending: Attending, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attend, "HANDLES_MAX", 2)
    for number in range(5):
        session = await opened(server, client, f"s{number}", affinity="one")
        await session.attend(0, query())
    await until(lambda: attending.ended == 2)
    assert attending.streams == 3


async def test_the_last_session_of_a_full_stream_still_gets_its_step_through(
    server: ScriptedServer, client: AsyncKVStoreClient, monkeypatch: pytest.MonkeyPatch
):
    """Its bind is answered together with the last other step, after which the stream would seem to be done with."""
    monkeypatch.setattr(attend, "HANDLES_MAX", 2)

    async def answer_together(_: object, requests, **__: object):  # type: ignore[no-untyped-def]
        yield bound((await anext(requests)).bind)
        step = (await anext(requests)).step
        bind = (await anext(requests)).bind
        yield bound(bind)
        yield answer(step)
        yield answer((await anext(requests)).step)

    first, second = [await opened(server, client, name, affinity="one") for name in ("first", "second")]
    monkeypatch.setattr(first._link.transport, "duplex", answer_together)
    waiting = asyncio.create_task(first.attend(1, query(), timeout=2))
    await asyncio.sleep(0.01)
    await asyncio.gather(waiting, second.attend(2, query(), timeout=2))


async def test_a_stream_that_nobody_reads_any_more_is_given_up_before_its_queue_grows(
    session: Session, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attend, "INFLIGHT_MAX", 1)
    monkeypatch.setattr(attend, "CLOSE_SECONDS", 0.01)
    opened: list[int] = []

    async def deaf_after_binding(_: object, requests, **__: object):  # type: ignore[no-untyped-def]
        opened.append(1)
        request = await anext(requests)
        yield bound(request.bind)
        if len(opened) == 2:
            yield answer((await anext(requests)).step)
        await asyncio.Event().wait()

    monkeypatch.setattr(session._link.transport, "duplex", deaf_after_binding)
    for _ in range(2):
        with pytest.raises(DeadlineExceeded):
            await session.attend(0, query(), timeout=0.05)
    await session.attend(0, query())
    assert len(opened) == 2
    await session._link.close()
