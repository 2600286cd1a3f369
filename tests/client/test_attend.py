import asyncio
import gc
import time

import pytest
import torch

from kvstore_client import (
    AsyncKVStoreClient,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    Fidelity,
    Internal,
    InvalidArgument,
    NotFound,
    Precision,
    Session,
)
from kvstore_client.tensors import from_proto, to_proto
from kvstore_proto.v1 import kvstore_pb2 as pb

from .attending import GOING_AWAY, Attending, answer, bound, error, opened, until
from .inputs import AppendLog, block, query
from .scripted import Failure, ScriptedServer


async def test_a_step_binds_its_session_once_and_names_its_end(session: Session, attending: Attending):
    q = query(2)
    out, lse = await session.attend(1, q, head_offset=0, debias=0.25, precision=Precision(keys_level=2), timeout=5)
    assert torch.equal(out, torch.ones_like(q))
    assert torch.equal(lse, torch.ones(2, 4))
    await session.attend(0, q)
    (bind,) = attending.binds
    assert (bind.session, bind.generation) == ("book", "1")
    first, second = attending.steps
    assert first.request_id != second.request_id
    assert list(first.items) == [pb.AttendStep.Item(handle=bind.handle, end=10, rows=2)]
    assert torch.equal(from_proto(first.q), q)
    assert (first.lse_base, first.precision.keys_level, first.debias) == (pb.LSE_BASE_E, 2, 0.25)
    assert 4000 < first.timeout_ms <= 5000
    assert not second.HasField("debias")


async def test_attention_tells_what_it_was_computed_from(session: Session, attending: Attending):
    answered = await session.attention(0, query())
    assert (answered.end, answered.fidelity) == (10, Fidelity("raw", "", Precision(), 0.0, exact=True))


async def test_out_comes_in_the_query_s_dtype(session: Session, attending: Attending):
    out, lse = await session.attend(1, query().bfloat16())
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


async def test_answers_in_any_order_reach_their_own_steps(session: Session, attending: Attending):
    held: list[pb.AttendStep] = []

    def hold(step: pb.AttendStep):  # type: ignore[no-untyped-def]
        held.append(step)
        return [answer(each) for each in reversed(held)] if len(held) == 8 else []

    attending.on_step = hold
    answers = await asyncio.gather(*(session.attend(layer, query()) for layer in range(8)))
    assert [out[0, 0, 0].item() for out, _ in answers] == list(range(8))
    assert (attending.streams, len(attending.binds)) == (1, 1)


async def test_sessions_of_one_affinity_share_a_stream(
    server: ScriptedServer, client: AsyncKVStoreClient, session: Session, attending: Attending
):
    fork = await opened(server, client, "fork", affinity="root-of-book")
    other = await opened(server, client, "other")
    for each in (session, fork, other):
        await each.attend(0, query())
    assert attending.streams == 2
    assert [bind.session for bind in attending.binds] == ["book", "fork", "other"]
    assert [call.metadata["x-kv-affinity"] for call in server.of("Attend")] == ["root-of-book", "root-of-other"]


@pytest.mark.parametrize(
    "loss", [None, Failure("UNAVAILABLE"), Failure("CANCELLED"), Failure("DEADLINE_EXCEEDED"), Failure("UNKNOWN")]
)
async def test_a_stream_lost_in_mid_step_is_replaced_bound_again_and_asked_again(
    session: Session, attending: Attending, loss: Failure | None
):
    attending.on_step = lambda step: [loss] if attending.streams == 1 else [answer(step)]
    answers = await asyncio.gather(*(session.attend(layer, query()) for layer in (1, 2)))
    assert [out[0, 0, 0].item() for out, _ in answers] == [1, 2]
    assert (attending.streams, len(attending.binds)) == (2, 2)


async def test_a_server_killed_in_mid_step_is_asked_again_when_it_is_back(server: ScriptedServer):
    attending = Attending(lambda step: [] if attending.streams == 1 else [answer(step)])
    server.always("Attend", attending)
    async with AsyncKVStoreClient(server.target) as client:
        session = await opened(server, client, "book")
        step = asyncio.create_task(session.attend(3, query(), timeout=10))
        await until(lambda: attending.steps)
        await server.stop()
        await server.start()
        out, _ = await step
    assert out[0, 0, 0] == 3


async def test_a_stream_that_the_server_refuses_for_good_fails_its_steps(session: Session, attending: Attending):
    attending.on_step = lambda _: [Failure("FAILED_PRECONDITION", "not like this")]
    with pytest.raises(FailedPrecondition, match="not like this"):
        await session.attend(0, query())


async def test_a_stream_that_ended_idle_is_replaced_unnoticed(session: Session, attending: Attending):
    attending.on_step = lambda step: [answer(step), None]
    await session.attend(0, query())
    await asyncio.sleep(0.02)
    await session.attend(0, query())
    assert attending.streams == 2


async def test_a_server_going_away_answers_what_it_has_and_gets_no_more(session: Session, attending: Attending):
    held: list[pb.AttendStep] = []

    def drain(step: pb.AttendStep):  # type: ignore[no-untyped-def]
        if attending.streams > 1:
            return [answer(step)]
        held.append(step)
        return [GOING_AWAY] if len(held) == 1 else []

    attending.on_step = drain
    first = asyncio.create_task(session.attend(1, query()))
    await until(lambda: held)
    await asyncio.sleep(0.02)
    out, _ = await session.attend(2, query())
    assert (attending.streams, len(held), out[0, 0, 0].item()) == (2, 1, 2)
    first.cancel()
    await until(lambda: attending.ended == 1)


async def test_a_step_admitted_before_going_away_gets_its_answer(session: Session, attending: Attending):
    attending.on_step = lambda step: [GOING_AWAY, answer(step), None]
    out, _ = await session.attend(5, query())
    assert (out[0, 0, 0].item(), attending.streams) == (5, 1)


async def test_a_failed_step_leaves_the_stream_to_the_others(session: Session, attending: Attending):
    attending.on_step = lambda step: [
        answer(step) if step.layer else error(step, Failure("NOT_FOUND", reason="GONE", facts={"handle": "1"}))
    ]
    with pytest.raises(NotFound) as caught:
        await session.attend(0, query())
    assert (caught.value.reason, caught.value.facts) == ("GONE", {"handle": "1"})
    await session.attend(1, query())
    assert attending.streams == 1


async def test_a_busy_server_is_asked_again_as_it_says(session: Session, attending: Attending):
    busy = Failure("RESOURCE_EXHAUSTED", retry_after_seconds=0.05)
    attending.on_step = lambda step: [answer(step) if len(attending.steps) > 1 else error(step, busy)]
    began = time.monotonic()
    await session.attend(0, query())
    assert time.monotonic() - began >= 0.05
    assert attending.streams == 1


async def test_a_step_without_an_answer_ends_at_its_deadline_and_is_cancelled_at_the_server(
    session: Session, attending: Attending
):
    attending.on_step = lambda step: [answer(step)] if step.layer else []
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await session.attend(0, query(), timeout=0.1)
    assert time.monotonic() - began < 1
    await until(lambda: attending.cancels == [attending.steps[0].request_id])
    attending.on_step = lambda step: [answer(attending.steps[0]), answer(step)]
    out, _ = await session.attend(7, query())
    assert out[0, 0, 0] == 7, "the late answer of another step is nobody's"
    assert attending.streams == 1


async def test_a_cancelled_step_is_cancelled_at_the_server_and_harms_no_other(session: Session, attending: Attending):
    held: list[pb.AttendStep] = []

    def hold(step: pb.AttendStep):  # type: ignore[no-untyped-def]
        held.append(step)
        return [answer(each) for each in held] if step.layer == 9 else []

    attending.on_step = hold
    steps = [asyncio.create_task(session.attend(layer, query())) for layer in (0, 1)]
    await until(lambda: len(held) == 2)
    steps[0].cancel()
    await until(lambda: attending.cancels)
    await session.attend(9, query())
    assert (await steps[1])[0][0, 0, 0] == 1
    assert steps[0].cancelled()
    assert attending.cancels == [next(step.request_id for step in held if step.layer == 0)]


async def test_a_session_that_cannot_be_bound_is_asked_for_again_by_the_next_step(
    session: Session, attending: Attending
):
    attending.on_bind = lambda bind: pb.AttendResponse(handle=bind.handle, error=Failure("NOT_FOUND").status())
    for _ in range(2):
        with pytest.raises(NotFound):
            await session.attend(0, query())
    attending.on_bind = bound
    await session.attend(0, query())
    assert (len(attending.binds), attending.streams) == (3, 1)
    assert len({bind.handle for bind in attending.binds}) == 3


async def test_a_cancelled_step_does_not_take_the_bind_from_the_others(server: ScriptedServer, session: Session):
    asked, free = asyncio.Event(), asyncio.Event()

    async def slow_bind(requests, context):  # type: ignore[no-untyped-def]
        async for request in requests:
            if request.WhichOneof("body") == "bind":
                asked.set()
                await free.wait()
                yield bound(request.bind)
            elif request.WhichOneof("body") == "step":
                yield answer(request.step)

    server.always("Attend", slow_bind)
    first, second = (asyncio.create_task(session.attend(layer, query())) for layer in (1, 2))
    await asked.wait()
    first.cancel()
    await asyncio.sleep(0)
    free.set()
    assert (await second)[0][0, 0, 0] == 2
    assert first.cancelled()


async def test_a_bind_that_nobody_waits_for_any_more_fails_silently(
    server: ScriptedServer, client: AsyncKVStoreClient, session: Session, caplog: pytest.LogCaptureFixture
):
    async def never_bind(requests, context):  # type: ignore[no-untyped-def]
        async for _ in requests:
            pass
        return
        yield

    server.always("Attend", never_bind)
    with pytest.raises(DeadlineExceeded):
        await session.attend(0, query(), timeout=0.05)
    await client.close()
    session._link._streams.clear()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


async def test_a_pinned_step_keeps_its_end_while_the_session_grows(
    server: ScriptedServer, session: Session, attending: Attending
):
    server.always("Append", AppendLog(length=10))
    step = session.pin()
    await step.attend(0, query())
    assert await session.append(*block(5)) == 15
    await step.attend(1, query())
    await session.attend(0, query())
    await session.pin(3).attend(0, query())
    assert [step.items[0].end for step in attending.steps] == [10, 10, 15, 3]


@pytest.mark.parametrize(
    "lie",
    [
        {"lse_base": pb.LSE_BASE_2},
        {"lse_layout": pb.LSE_LAYOUT_UNSPECIFIED},
        {"items": []},
        {"out": to_proto(torch.zeros(1, 4, 16))},
        {"lse": to_proto(torch.zeros(4, 1))},
        {"lse": to_proto(torch.zeros(1, 4, dtype=torch.float16))},
    ],
)
async def test_an_answer_in_another_convention_is_an_error_not_a_wrong_number(
    session: Session, attending: Attending, lie: dict[str, object]
):
    def lying(step: pb.AttendStep):  # type: ignore[no-untyped-def]
        reply = answer(step)
        for field in lie:
            reply.result.ClearField(field)  # type: ignore[arg-type]
        reply.result.MergeFrom(pb.AttendResult(**lie))  # type: ignore[arg-type]
        return [reply]

    attending.on_step = lying
    with pytest.raises(Internal):
        await session.attend(0, query())


@pytest.mark.parametrize("q", [torch.zeros(4, 32), torch.zeros(1, 4, 32, dtype=torch.int64)])
async def test_a_query_of_another_form_is_refused_here(session: Session, q: torch.Tensor):
    with pytest.raises(InvalidArgument, match="q: must be a float tensor"):
        await session.attend(0, q)


async def test_closing_the_client_ends_its_streams_in_order(server: ScriptedServer, attending: Attending):
    async with AsyncKVStoreClient(server.target) as client:
        session = await opened(server, client, "book")
        await session.attend(0, query())
    assert attending.ended == 1
    with pytest.raises(Cancelled, match="closed"):
        await session.attend(0, query())
