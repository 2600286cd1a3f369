from collections import Counter
from dataclasses import dataclass

import pytest

from kvstore_server.scheduling.fair_lane import SECONDS_AT_FIRST, FairLane


@dataclass(frozen=True)
class Piece:
    tenant: str
    key: str | None = None


def served(lane: FairLane[Piece], runs: int, seconds: dict[str, float]) -> Counter[str]:
    """Whose work the device did in so many runs, each of which takes its tenant's seconds."""
    done = Counter[str]()
    for _ in range(runs):
        taken = lane.take(64)
        lane.charge(taken[0].tenant, len(taken), seconds[taken[0].tenant])
        done[taken[0].tenant] += len(taken)
    return done


def lane_of(weights: dict[str, int], pieces: int) -> FairLane[Piece]:
    lane = FairLane[Piece](weights.__getitem__)
    for tenant in weights:
        for _ in range(pieces):
            lane.add(Piece(tenant))
    return lane


def test_tenants_get_the_device_by_weight() -> None:
    done = served(lane_of({"a": 1, "b": 3}, 100), 40, {"a": 0.02, "b": 0.02})
    assert done == {"a": 10, "b": 30}


def test_what_counts_is_time_not_pieces() -> None:
    done = served(lane_of({"a": 1, "b": 1}, 100), 44, {"a": 0.1, "b": 0.01})
    assert done == {"a": 4, "b": 40}


def test_who_was_away_does_not_catch_up() -> None:
    lane = lane_of({"a": 1}, 100)
    lane._weight_of = lambda _: 1
    served(lane, 50, {"a": 1.0})
    for _ in range(20):
        lane.add(Piece("b"))
    assert served(lane, 20, {"a": 1.0, "b": 1.0}) == {"a": 10, "b": 10}


def test_one_that_comes_seldom_is_next() -> None:
    lane = lane_of({"a": 1}, 100)
    lane._weight_of = lambda _: 1
    served(lane, 50, {"a": 1.0})
    lane.add(Piece("b"))
    assert [lane.take(1)[0].tenant for _ in range(2)].count("b") == 1


def test_work_of_one_key_is_taken_together_and_the_rest_keeps_its_order() -> None:
    lane = FairLane[Piece](lambda _: 1)
    for key in "xyxyz":
        lane.add(Piece("a", key))
    assert ["".join(piece.key or "" for piece in lane.take(64)) for _ in range(3)] == ["xx", "yy", "z"]
    assert not len(lane)


def test_the_wait_is_known_from_what_was_measured() -> None:
    lane = lane_of({"a": 1, "b": 1}, 30)
    assert lane.wait_seconds("a", 10) == pytest.approx(20 * SECONDS_AT_FIRST)
    served(lane, 40, {"a": 0.05, "b": 0.05})
    assert lane.wait_seconds("a", 10) == pytest.approx(2 * 10 * 0.05, rel=0.05)
    assert lane.wait_seconds("a", 100) == pytest.approx(110 * 0.05, rel=0.05), "the other tenant has ten pieces only"
    assert lane.wait_seconds_max("a", 10) >= lane.wait_seconds("a", 10)


def test_one_slow_run_does_not_stop_a_tenant() -> None:
    lane = lane_of({"a": 1}, 3)
    served(lane, 1, {"a": 60.0})
    assert lane.wait_seconds("a", 10) < 0.05
