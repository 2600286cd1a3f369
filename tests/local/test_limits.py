"""The arithmetic of `make bench-scale-out`, on numbers that can be followed by hand."""

import pytest

from .limits import PREFIX_WRITES_MAX, ROLL_COMMANDS, SWEEP_SECONDS, Replica, append_seconds, demand, replicas_within
from .stack import redis_settings
from .work import APPEND, CENSUS, CHANGE, IDLE, LIST, READ, SET, USE, Work

WORK = {
    APPEND: Work(APPEND, scripts=2, commands=13, puts=1, gets=0, lists=2, put_bytes=100),
    USE: Work(USE, scripts=0, commands=0, puts=0, gets=0, lists=0.5, put_bytes=0),
    IDLE: Work(IDLE, scripts=0, commands=0, puts=0, gets=0, lists=0.25, put_bytes=0),
}
CEILINGS = {SET: 10_000.0, READ: 8_000.0, CHANGE: 8_000.0, CENSUS: 4_000.0, LIST: 100.0}
ONE = Replica(attends=1000, append_bytes=10 * 512 * 131_072, append_tokens=512, in_use=4, stored=100)


def test_what_replicas_ask_is_the_sum_of_what_they_do() -> None:
    ten = demand(WORK, CEILINGS, ONE, 10)
    assert (ten.attends, ten.appends) == (10_000, 100)
    assert (ten.store_writes, ten.store_reads) == (100, 100 * 2 + 40 * 0.5 + 10 * 0.25)
    sweeps, rolls = 1 / SWEEP_SECONDS, 10 * ROLL_COMMANDS
    assert ten.redis_requests == pytest.approx(200 + sweeps * (1 + 10 + 40) + rolls)
    assert ten.redis_busy == pytest.approx(200 / 8_000 + sweeps * (1 / 100 + 10 / 4_000 + 40 / 10_000) + rolls / 10_000)
    assert ten.store_bytes == pytest.approx(100 * 512 * 33_792, rel=0.01)
    assert ten.prefixes == 1


def test_more_writes_than_one_prefix_takes_need_more_prefixes() -> None:
    assert demand(WORK, CEILINGS, ONE, int(PREFIX_WRITES_MAX / 10) + 1).prefixes == 2


def test_redis_carries_so_many_replicas_and_not_one_more() -> None:
    most = replicas_within(WORK, CEILINGS, ONE)
    assert demand(WORK, CEILINGS, ONE, most).redis_busy <= 1 < demand(WORK, CEILINGS, ONE, most + 1).redis_busy
    assert replicas_within(WORK, {**CEILINGS, READ: 1.0}, ONE) == 0
    assert append_seconds(WORK, CEILINGS) == 1 / 4_000


def test_redis_gets_its_settings_but_for_places() -> None:
    settings = redis_settings({"port": "1", "bind": "127.0.0.1", "dir": "/tmp"}).splitlines()
    assert {"port 1", "bind 127.0.0.1", "dir /tmp", "appendonly yes", "maxmemory-policy noeviction"} <= set(settings)
    with pytest.raises(AssertionError):
        redis_settings({"prot": "1"})
