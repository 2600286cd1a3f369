import asyncio
import threading
from collections.abc import Iterator
from time import monotonic

import pytest

from kvstore_server.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from kvstore_server.scheduling.engine import Engine, Lane


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(waiting_max=3)
    yield engine
    engine.close(5)


def soon() -> float:
    return monotonic() + 10


async def test_results_and_errors_come_back_from_one_thread(engine: Engine) -> None:
    names = {await engine.run(lambda: threading.current_thread().name, soon()) for _ in range(3)}
    assert names == {"kvstore-device"}
    with pytest.raises(ZeroDivisionError):
        await engine.run(lambda: 1 // 0, soon())


async def test_lanes_alternate_while_both_wait(engine: Engine) -> None:
    order: list[str] = []
    gate = threading.Event()
    first = asyncio.create_task(engine.run(gate.wait, soon(), "query"))
    await asyncio.sleep(0.01)
    waiting: list[tuple[str, Lane]] = [("e1", "encode"), ("e2", "encode"), ("q1", "query"), ("q2", "query")]
    work = [
        asyncio.create_task(engine.run(lambda name=name: order.append(name), soon(), lane)) for name, lane in waiting
    ]
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(first, *work)
    assert order == ["e1", "q1", "e2", "q2"]


async def test_work_past_its_deadline_is_dropped_before_it_begins(engine: Engine) -> None:
    ran: list[int] = []
    with pytest.raises(DeadlineExceeded):
        await engine.run(lambda: ran.append(1), monotonic() - 0.001)
    assert not ran


async def test_a_full_lane_refuses_and_the_other_does_not(engine: Engine) -> None:
    gate = threading.Event()
    running = asyncio.create_task(engine.run(gate.wait, soon()))
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(engine.run(lambda: None, soon())) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as refused:
        await engine.run(lambda: None, soon())
    assert refused.value.facts["limit"] == "3"
    other = asyncio.create_task(engine.run(lambda: 7, soon(), "encode"))
    gate.set()
    await asyncio.gather(running, *waiting)
    assert await other == 7


async def test_a_cancelled_caller_takes_its_waiting_work_along(engine: Engine) -> None:
    gate, ran = threading.Event(), threading.Event()
    running = asyncio.create_task(engine.run(gate.wait, soon()))
    await asyncio.sleep(0.01)
    dropped = asyncio.create_task(engine.run(ran.set, soon()))
    await asyncio.sleep(0.01)
    dropped.cancel()
    await asyncio.sleep(0)
    gate.set()
    await running
    await engine.run(lambda: None, soon())
    assert not ran.is_set()


async def test_close_finishes_what_waits_and_refuses_what_comes() -> None:
    engine = Engine(waiting_max=3)
    done = asyncio.create_task(engine.run(lambda: 1, soon()))
    await asyncio.sleep(0)
    await asyncio.to_thread(engine.close, 5)
    assert await done == 1
    with pytest.raises(Unavailable):
        await engine.run(lambda: None, soon())
