import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import monotonic, sleep

import pytest

from kvstore_server.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from kvstore_server.scheduling.completion import Later, Told
from kvstore_server.scheduling.engine import TOGETHER_MAX, Engine, Lane, Work


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


class Passes:
    """Work that notes which items came together."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    def run(self, items: list[int]) -> list[int]:
        self.taken.append(items)
        return [item * 10 for item in items]


async def blocked(engine: Engine) -> tuple[threading.Event, "asyncio.Task[bool]"]:
    """The device is busy until the event is set."""
    gate = threading.Event()
    running = asyncio.create_task(engine.run(gate.wait, soon()))
    await asyncio.sleep(0.01)
    return gate, running


async def test_what_waits_for_one_key_runs_together_and_each_gets_its_own() -> None:
    engine, passes = Engine(waiting_max=200), Passes()
    gate, running = await blocked(engine)
    work = [engine.run_together(n % 2, n, passes.run, soon()) for n in range(10)]
    await asyncio.sleep(0.01)
    gate.set()
    assert await asyncio.gather(*work) == [n * 10 for n in range(10)]
    assert passes.taken == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    await running
    await asyncio.to_thread(engine.close, 5)


async def test_bringing_what_queries_read_does_not_count_as_what_they_take() -> None:
    brought = 0

    def bring() -> None:
        nonlocal brought
        brought += 1
        sleep(0.02)

    engine = Engine(waiting_max=200, setups=lambda: brought)
    before = engine.wait_seconds("a", 31, 0.0)
    for _ in range(5):
        await engine.run(bring, soon(), tenant="a")
    assert engine.wait_seconds("a", 31, 0.0) == before
    for _ in range(5):
        await engine.run(lambda: sleep(0.02), soon(), tenant="a")
    assert engine.wait_seconds("a", 31, 0.0) > 0.2
    await asyncio.to_thread(engine.close, 5)


async def test_a_pass_is_bounded() -> None:
    engine, passes = Engine(waiting_max=200), Passes()
    gate, running = await blocked(engine)
    work = [engine.run_together("key", n, passes.run, soon()) for n in range(TOGETHER_MAX + 1)]
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(running, *work)
    assert [len(taken) for taken in passes.taken] == [TOGETHER_MAX, 1]
    await asyncio.to_thread(engine.close, 5)


async def test_the_late_and_the_cancelled_leave_the_rest_of_a_pass_alone(engine: Engine) -> None:
    passes = Passes()
    gate, running = await blocked(engine)
    late = engine.run_together("key", 1, passes.run, monotonic() - 0.001)
    gone = engine.run_together("key", 2, passes.run, soon())
    kept = engine.run_together("key", 3, passes.run, soon())
    await asyncio.sleep(0.01)
    gone.cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await kept == 30
    with pytest.raises(DeadlineExceeded):
        await late
    assert passes.taken == [[3]]
    await running


async def test_the_next_pass_is_launched_while_the_device_finishes_the_last(engine: Engine) -> None:
    finished, launched = threading.Event(), threading.Event()

    def launch() -> Later[str]:
        launched.set()
        return Later(lambda: "second")

    gate, running = await blocked(engine)
    first = asyncio.create_task(engine.run(lambda: Later(lambda: finished.wait(10)), soon()))
    second = asyncio.create_task(engine.run(launch, soon()))
    await asyncio.sleep(0.01)
    gate.set()
    await running
    assert await asyncio.to_thread(launched.wait, 5)
    assert not first.done()
    finished.set()
    assert await first is True
    assert await second == "second"


@pytest.mark.parametrize("later", [False, True])
async def test_a_lost_device_answers_all_work_and_says_so_once(later: bool) -> None:
    told: list[BaseException] = []
    engine = Engine(8, is_fatal=lambda error: isinstance(error, OSError), on_fatal=told.append)
    gate = threading.Event()

    def lose() -> None:
        gate.wait()
        raise OSError("the device fell off the bus")

    lost = asyncio.create_task(engine.run(lambda: Later(lose) if later else lose(), soon()))
    await asyncio.sleep(0.01)
    waiting = [asyncio.create_task(engine.run(gate.wait, soon(), "encode")) for _ in range(0 if later else 2)]
    await asyncio.sleep(0.01)
    gate.set()
    for outcome in await asyncio.gather(lost, *waiting, return_exceptions=True):
        assert isinstance(outcome, Unavailable)
        assert outcome.reason == "DEVICE_LOST"
    with pytest.raises(Unavailable):
        await engine.run(lambda: None, soon())
    assert [type(error) for error in told] == [OSError]
    await asyncio.to_thread(engine.close, 5)


async def test_other_errors_of_what_is_finished_later_fail_only_their_work(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        await engine.run(lambda: Later(lambda: 1 // 0), soon())
    assert await engine.run(lambda: 1, soon()) == 1


async def test_all_work_runs_where_the_device_orders_it() -> None:
    entered = ContextVar("entered", default=False)

    @contextmanager
    def ordered() -> Iterator[None]:
        token = entered.set(True)
        yield
        entered.reset(token)

    engine = Engine(waiting_max=3, ordered=ordered)
    assert [await engine.run(entered.get, monotonic() + 10, lane) for lane in ("query", "encode")] == [True, True]
    assert not entered.get()
    engine.close(10)


class Replaying:
    """What a device does that repeats runs: their answers are there when `finish` is called."""

    def __init__(self, known: bool = True) -> None:
        self.known = known
        self.launched: list[tuple[list[int], str]] = []
        self._open: list[threading.Event] = []

    def at_once(self, items: list[int]) -> Later[list[int]] | None:
        if not self.known:
            return None
        self.launched.append((items, threading.current_thread().name))
        done = threading.Event()
        self._open.append(done)
        return Later(lambda: [done.wait(10) and item for item in items], done.is_set)

    def work(self, items: list[int]) -> list[int]:
        self.launched.append((items, threading.current_thread().name))
        return items

    def finish(self) -> None:
        self._open.pop(0).set()


def ask(engine: Engine, device: Replaying, item: int) -> "asyncio.Future[int]":
    return engine.run_together("key", item, device.work, soon(), device.at_once)


async def test_what_is_only_repeated_is_launched_by_the_caller_and_the_rest_goes_with_the_next(engine: Engine) -> None:
    device, here = Replaying(), threading.current_thread().name
    asked = [ask(engine, device, item) for item in range(5)]
    assert device.launched == [([0], here), ([1], here)], "no more than two runs of a key are ahead"
    device.finish()
    assert await asked[0] == 0
    await asyncio.sleep(0)
    assert device.launched[2:] == [([2, 3, 4], here)]
    assert not any(each.done() for each in asked[1:])
    device.finish()
    device.finish()
    assert await asyncio.gather(*asked[1:]) == [1, 2, 3, 4]


async def test_what_is_not_known_yet_and_what_comes_while_another_launches_goes_to_the_device_thread(
    engine: Engine,
) -> None:
    device = Replaying(known=False)
    assert await ask(engine, device, 1) == 1
    device.known = True
    gate = threading.Event()
    running = asyncio.create_task(engine.run(gate.wait, soon(), "encode"))
    await asyncio.sleep(0.05)
    asked = ask(engine, device, 2)
    gate.set()
    assert await asked == 2
    assert device.launched == [([1], "kvstore-device"), ([2], "kvstore-device")]
    await running


async def test_waiting_work_that_a_caller_could_not_launch_goes_to_the_device_thread(engine: Engine) -> None:
    device = Replaying()
    asked = [ask(engine, device, item) for item in range(3)]
    device.known = False
    device.finish()
    device.finish()
    assert await asyncio.gather(*asked) == [0, 1, 2]
    assert device.launched[2] == ([2], "kvstore-device")


async def test_the_late_and_the_cancelled_are_not_launched_with_the_next(engine: Engine) -> None:
    device = Replaying()
    ahead = [ask(engine, device, item) for item in range(2)]
    late = engine.run_together("key", 2, device.work, monotonic() - 1, device.at_once)
    cancelled, good = ask(engine, device, 3), ask(engine, device, 4)
    cancelled.cancel()
    device.finish()
    await ahead[0]
    with pytest.raises(DeadlineExceeded):
        await late
    device.finish()
    device.finish()
    assert await good == 4
    assert device.launched[2][0] == [4]


@pytest.mark.parametrize("how", ["cancelled", "fails"])
async def test_what_waits_behind_others_that_come_to_nothing_is_not_left_alone(engine: Engine, how: str) -> None:
    def broken(_: list[int]) -> None:
        raise ZeroDivisionError

    device = Replaying()
    ahead = [ask(engine, device, item) for item in range(2)]
    nothing = [engine.run_together(name, 0, device.work, soon(), broken) for name in ("key", "a")]
    last = engine.run_together("b", 7, device.work, soon(), device.at_once)
    if how == "cancelled":
        for each in nothing:
            each.cancel()
    for _ in ahead:
        device.finish()
    assert await asyncio.gather(*ahead) == [0, 1]
    assert await asyncio.wait_for(last, 5) == 7
    if how == "fails":
        assert [type(each.exception()) for each in nothing] == [ZeroDivisionError] * 2


async def test_who_is_told_hears_once_or_never_and_disturbs_nobody(engine: Engine) -> None:
    device, heard, loop = Replaying(), list[object](), asyncio.get_running_loop()
    failures = list[dict[str, object]]()
    loop.set_exception_handler(lambda _, context: failures.append(context))

    def tell(result: int | None, error: BaseException | None) -> None:
        heard.append((result, error))
        if result == 1:
            raise RuntimeError("a bug of whoever is told")

    def told(item: int) -> Told[int]:
        done = Told(tell)
        engine.tell_together(Work("", item, device.work, "key", soon(), done, monotonic(), device.at_once))
        return done

    first, second, unwanted = told(1), told(2), told(3)
    unwanted.cancel()
    device.finish()
    device.finish()
    async with asyncio.timeout(10):
        while len(heard) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert heard == [(1, None), (2, None)]
    assert (first.done(), second.done(), unwanted.cancelled()) == (True, True, True)
    assert [str(each["exception"]) for each in failures] == ["a bug of whoever is told"]
