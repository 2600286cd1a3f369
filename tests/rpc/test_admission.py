"""Who is let in, decided without waiting."""

import time

import pytest

from kvstore_server.errors import ResourceExhausted, Unavailable
from kvstore_server.limits import Limits
from kvstore_server.rpc.admission import POOL_OF, Admission
from kvstore_server.rpc.handlers import SERVICE
from kvstore_server.scheduling.engine import Engine

COST_US_MAX = 100
"""A bound for a busy machine; what it was is printed."""


def admission(wait_seconds: float = 0.0, **limits: int) -> Admission:
    return Admission(
        Limits(**limits),
        weight_of=lambda _: 1,
        has_tenants=True,
        wait_seconds=lambda tenant, before, enough: wait_seconds,
    )


def soon() -> float:
    return time.monotonic() + 10


def test_pools_are_of_methods_that_exist() -> None:
    assert set(POOL_OF) <= {method.name for method in SERVICE.methods}


async def test_a_call_holds_its_place_until_it_ends() -> None:
    door = admission(projections_inflight_max=1)
    with door.call("PutProjection", "a", soon()):
        with pytest.raises(ResourceExhausted) as refused, door.call("GetProjection", "b", soon()):
            raise AssertionError
        with door.call("GetServerInfo", "b", soon()):
            assert door.in_flight == 2
    assert refused.value.facts["bound"] == "projections_inflight_max"
    assert (door.in_flight, door.pools["projections"].held) == (0, 0)
    with door.call("GetProjection", "b", soon()):
        pass


async def test_a_query_that_would_wait_too_long_is_told_when_to_come_again() -> None:
    door = admission(wait_seconds=1.5)
    with door.call("TopK", "a", soon()), door.call("Score", "a", soon()):
        with pytest.raises(ResourceExhausted) as refused, door.call("TopK", "a", soon()):
            raise AssertionError
        with door.call("Fetch", "a", soon()), door.call("TopK", "b", soon()):
            pass
    assert refused.value.facts["bound"] == "query_wait_ms_max"
    assert refused.value.retry_after_seconds == 1.5


async def test_a_query_that_cannot_finish_in_time_is_not_begun() -> None:
    door = admission(wait_seconds=0.5)
    with (
        door.call("TopK", "a", soon()),
        door.call("TopK", "a", soon()),
        pytest.raises(ResourceExhausted),
        door.call("TopK", "a", time.monotonic() + 0.4),
    ):
        raise AssertionError


async def test_the_bytes_of_a_request_are_held_too() -> None:
    door = admission(queries_inflight_bytes_max=16 << 20)
    with door.call("TopK", "a", soon()) as place:
        place.grow(12 << 20)
        with pytest.raises(ResourceExhausted) as refused, door.call("TopK", "a", soon()) as other:
            other.grow(8 << 20)
    assert refused.value.facts["bound"] == "queries_inflight_bytes_max"
    assert door.pools["queries"].free_bytes == 16 << 20


async def test_a_draining_server_lets_nobody_in_and_waits_for_those_inside() -> None:
    door = admission()
    with door.call("TopK", "a", soon()):
        door.draining.set()
        with pytest.raises(Unavailable) as refused, door.call("GetServerInfo", "a", soon()):
            raise AssertionError
    assert refused.value.reason == "DRAINING"
    await door.idle()


async def test_letting_a_step_in_costs_microseconds() -> None:
    engine = Engine(64)
    door = Admission(Limits(), weight_of=lambda _: 1, has_tenants=True, wait_seconds=engine.wait_seconds)
    turns, room, deadline = door.turns("a"), door.pools["steps"].share("a"), soon() + 600
    for _ in range(31):
        room.take(8192)
    times, began = 20_000, time.perf_counter()
    for _ in range(times):
        turns.check(deadline)
        room.take(8192)
        room.give(8192)
    microseconds = (time.perf_counter() - began) / times * 1e6
    engine.close(5)
    print(f"admission of one Attend step, 31 others in flight: {microseconds:.1f} us")
    assert microseconds < COST_US_MAX
