from math import isnan

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram

from kvstore_server.monitoring.history import History, Moment


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def later(history: History, registry: CollectorRegistry, seconds: float) -> None:
    now = Moment.now(registry)
    history.moments.append(Moment(seconds, now.samples))


def test_moments_share_what_does_not_change(registry: CollectorRegistry) -> None:
    history, calls = History(registry), Counter("calls", "", ["code"], registry=registry)
    calls.labels("OK").inc()
    history.note()
    calls.labels("BUSY").inc(2)
    history.note()
    first, second = history.moments
    assert second.total("calls_total", code="BUSY") == 2
    assert {id(key) for key in first.samples} < {id(key) for key in second.samples}


def test_rates_are_between_moments_and_by_label(registry: CollectorRegistry) -> None:
    history, calls = History(registry), Counter("calls", "", ["code"], registry=registry)
    later(history, registry, 100.0)
    calls.labels("OK").inc(50)
    calls.labels("BUSY").inc(5)
    later(history, registry, 110.0)
    later(history, registry, 120.0)
    assert history.rates("calls_total") == [5.5, 0]
    assert history.rates("calls_total", code="BUSY") == [0.5, 0]
    assert history.rates("calls_total", code="NONE") == [0, 0]


def test_percentiles_are_of_what_came_between(registry: CollectorRegistry) -> None:
    history = History(registry)
    seconds = Histogram("seconds", "", buckets=(1, 2, 4), registry=registry)
    seconds.observe(0.5)
    later(history, registry, 0.0)
    for value in (1.5, 1.5, 3, 3):
        seconds.observe(value)
    later(history, registry, 10.0)
    later(history, registry, 20.0)
    seconds.observe(100)
    later(history, registry, 30.0)
    found = history.percentiles("seconds", 0.5)
    assert found[0] == 2
    assert isnan(found[1])
    assert found[2] == 4, "beyond the last bound nothing is known"
    assert history.percentiles("seconds", 0.75)[0] == 3
