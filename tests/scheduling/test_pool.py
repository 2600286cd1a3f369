import random
from contextlib import suppress

import pytest

from kvstore_server.errors import ResourceExhausted
from kvstore_server.scheduling.pool import Bound, Pool, Share


def taken(share: Share, size: int = 0) -> int:
    """Places taken until one was refused."""
    count = 0
    while True:
        try:
            share.take(size)
        except ResourceExhausted:
            return count
        count += 1


def test_without_tenants_everything_is_given_and_the_bound_named() -> None:
    pool = Pool(Bound("queries_inflight_max", 3))
    share = pool.share("default")
    assert taken(share) == 3
    with pytest.raises(ResourceExhausted) as refused:
        share.take()
    assert refused.value.facts == {"bound": "queries_inflight_max", "limit": "3"}
    share.give()
    assert taken(share) == 1


def test_a_tenant_never_takes_the_last_from_those_that_come() -> None:
    pool = Pool(Bound("places", 256), over_free=4)
    assert taken(pool.share("hog")) == 205
    others = [taken(pool.share(f"other-{number}")) for number in range(3)]
    assert others == [41, 8, 1]


def test_tenants_that_all_want_everything_get_the_same() -> None:
    pool = Pool(Bound("places", 410), over_free=4)
    shares = [pool.share(f"t{number}") for number in range(10)]
    chance = random.Random(1)
    taken(shares[0])
    for _ in range(20_000):
        for share in chance.sample(shares, 3):
            with suppress(ResourceExhausted):
                share.take()
        chance.choice([share for share in shares if share.places]).give()
    assert all(36 <= share.places <= 41 for share in shares)


def test_a_weight_multiplies_what_a_tenant_may_hold() -> None:
    pool = Pool(Bound("places", 100), over_free=1, weight_of={"a": 1, "b": 3}.__getitem__)
    assert taken(pool.share("a")) == 50
    assert taken(pool.share("b")) == 37


def test_bytes_are_shared_likewise_and_come_back() -> None:
    pool = Pool(Bound("places", 100), Bound("bytes", 1000), over_free=4)
    hog, other = pool.share("hog"), pool.share("other")
    assert taken(hog, 100) == 8
    other.take(100)
    with pytest.raises(ResourceExhausted, match="bytes 1000"):
        other.grow(200)
    other.give(100)
    for _ in range(8):
        hog.give(100)
    assert (pool.held, pool.free_bytes) == (0, 1000)
