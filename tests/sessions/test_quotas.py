from collections.abc import Callable

import pytest

from kvstore_server.errors import ResourceExhausted
from kvstore_server.metadata.index import Holdings
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.tenants import Quota

from ..metadata.entries import entry

REMEMBERED = 30.0
IN_A = entry("new", tenant="a")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def each_has(quota: Quota) -> Callable[[str], Quota]:
    return lambda _: quota


def facts(refusal: ResourceExhausted | None) -> tuple[str, str] | None:
    return None if refusal is None else (refusal.reason, refusal.facts["quota"])


def test_without_a_quota_nothing_is_refused() -> None:
    quotas = Quotas(each_has(Quota()), REMEMBERED)
    quotas.received("a", 1 << 60)
    quotas.stored(IN_A, 1 << 60)
    assert quotas.append_refusal("a") is quotas.session_refusal("a") is None


def test_what_the_index_tells_and_what_came_since_count_together() -> None:
    quotas = Quotas(each_has(Quota(sessions_max=3, stored_bytes_max=2500)), REMEMBERED)
    quotas.measured("a", Holdings.of([entry("x"), entry("y")]))  # 1,000 bytes each
    quotas.stored(IN_A, 499)
    assert quotas.append_refusal("a") is quotas.session_refusal("a") is None
    quotas.stored(IN_A, 1)
    quotas.created(IN_A)
    assert facts(quotas.append_refusal("a")) == ("QUOTA", "stored_bytes_max")
    assert facts(quotas.session_refusal("a")) == ("QUOTA", "sessions_max")
    assert quotas.append_refusal("b") is quotas.session_refusal("b") is None
    quotas.measured("a", Holdings.of([entry("x")]))
    assert quotas.append_refusal("a") is quotas.session_refusal("a") is None


def test_what_came_in_since_an_older_count_is_added_and_what_came_before_is_not() -> None:
    clock = Clock()
    quotas = Quotas(each_has(Quota(stored_bytes_max=1000)), REMEMBERED, clock)
    for _ in range(3):
        clock.now += 10
        quotas.stored(IN_A, 300)
    for stored, age_seconds, is_full in ((400, 11, True), (399, 11, False), (700, 1, True), (999, 0, False)):
        quotas.measured("a", Holdings(sessions=1, stored_bytes=stored), age_seconds)
        assert (quotas.append_refusal("a") is not None) == is_full


def test_what_a_list_shows_already_counts_once() -> None:
    quotas = Quotas(each_has(Quota(sessions_max=4, stored_bytes_max=2500)), REMEMBERED)
    quotas.created(entry("x", length=0, tenant="a"))
    for length in (10, 20):
        quotas.stored(entry("x", length=length, tenant="a"), 1000)
    quotas.created(entry("y", 2, length=0, tenant="a"))
    listed = [entry("x", length=10), entry("y", 1)]  # the last of x and the new y are not there
    quotas.measured("a", Holdings(sessions=2, stored_bytes=1499), 1, listed)
    assert quotas.append_refusal("a") is quotas.session_refusal("a") is None
    quotas.measured("a", Holdings(sessions=3, stored_bytes=1500), 1, listed)
    assert facts(quotas.append_refusal("a")) == ("QUOTA", "stored_bytes_max")
    assert facts(quotas.session_refusal("a")) == ("QUOTA", "sessions_max")


def test_what_was_added_is_not_remembered_for_ever() -> None:
    clock = Clock()
    quotas = Quotas(each_has(Quota(stored_bytes_max=int(REMEMBERED) + 2)), REMEMBERED, clock)
    for _ in range(1000):
        clock.now += 1
        quotas.stored(IN_A, 1)
    assert quotas.append_refusal("a")
    quotas.measured("a", Holdings(), age_seconds=1e9)
    assert not quotas.append_refusal("a")


def test_a_tenant_may_have_a_quota_of_its_own() -> None:
    quotas = Quotas({"a": Quota(sessions_max=1), "b": Quota()}.__getitem__, REMEMBERED)
    for tenant in ("a", "b"):
        quotas.created(entry(tenant=tenant))
    assert facts(quotas.session_refusal("a")) == ("QUOTA", "sessions_max")
    assert quotas.session_refusal("b") is None


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_appends_of_any_size_come_at_the_rate_on_average(size: int) -> None:
    clock = Clock()
    quotas = Quotas(each_has(Quota(append_bytes_per_second_max=1000)), REMEMBERED, clock)
    admitted = 0
    while clock.now < 1100:
        refusal = quotas.append_refusal("a")
        if refusal is None:
            quotas.received("a", size)
            admitted += size
        else:
            assert facts(refusal) == ("QUOTA", "append_bytes_per_second_max")
            clock.now += refusal.retry_after_seconds + 1e-9
    assert 1000 * 1000 <= admitted <= 1000 * 1000 + 2 * size
