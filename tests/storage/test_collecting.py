"""What ended generations left goes when its time has come, and nothing that anyone may still read."""

import pytest

from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.keys import ref_key
from kvstore_server.storage.verify import verify_store

from .facts import facts_of
from .inputs import CLOCK_SECONDS, TENANT, append, commit_log, created, loaded, log_key, three_appends
from .memory_store import MemoryStore

GRACE_SECONDS = 100.0
FIRST = "000000000000"


def collect(store: MemoryStore, session: str = "a", later_seconds: float = GRACE_SECONDS) -> int:
    return Collector(store, TENANT, GRACE_SECONDS, lambda: CLOCK_SECONDS + later_seconds).collect(session)


def logs(store: MemoryStore) -> list[str]:
    return [key for key in store.objects if "/log/" in key]


def test_a_deleted_generation_goes_after_the_grace_and_its_name_s_records_stay(
    log: CommitLog, store: MemoryStore
) -> None:
    three_appends(log)
    log.delete("a")
    assert collect(store, later_seconds=GRACE_SECONDS - 1) == 0
    assert collect(store) == 3
    assert logs(store) == []
    assert created(log).generation == "000000000002"
    assert verify_store(store).damaged == []


def test_the_living_generation_is_never_touched(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    log.delete("a")
    append(log, created(log), 2)
    before = facts_of(store)
    assert collect(store, later_seconds=1e9) == 3
    assert facts_of(store) == before
    assert logs(store) == [log_key(0, generation=2)]


def test_what_a_fork_shares_stays_until_the_fork_is_gone_too(log: CommitLog, store: MemoryStore) -> None:
    child, _ = log.fork(three_appends(log), 3, "b")
    grandchild, _ = log.fork(child, 2, "c")
    log.delete("a")
    log.delete("b")
    before = facts_of(store)
    assert collect(store) == collect(store, "b") == 0
    assert facts_of(store) == before
    log.delete(grandchild.session)
    assert collect(store, later_seconds=GRACE_SECONDS - 1) == 0
    assert collect(store) == 3 + 2
    assert logs(store) == []


def test_a_reference_whose_fork_never_came_does_not_keep_garbage_and_the_fork_comes_no_more(
    log: CommitLog, store: MemoryStore
) -> None:
    three_appends(log)
    store.objects[ref_key(TENANT, "a", FIRST, "b", FIRST)] = b""
    log.delete("a")
    assert collect(store) == 4
    assert created(log, "b").generation == "000000000001"
    assert verify_store(store).damaged == []


def test_a_reference_is_not_a_fork_s_if_the_name_went_to_a_session_of_its_own(
    log: CommitLog, store: MemoryStore
) -> None:
    three_appends(log)
    store.objects[ref_key(TENANT, "a", FIRST, "b", FIRST)] = b""
    created(log, "b")
    log.delete("a")
    assert collect(store) == 4
    assert log.load("b")


def test_what_a_stale_writer_leaves_after_the_collection_goes_at_the_next(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    log.delete("a")
    collect(store)
    store.objects[log_key(6)] = b"late"
    assert collect(store) == 1
    assert logs(store) == []


def test_an_expired_generation_can_be_read_by_its_name_until_the_grace_is_over(
    log: CommitLog, store: MemoryStore
) -> None:
    state = three_appends(log)
    log.update(state, ttl_seconds=5.0, pinned=False)
    assert log.expire("a", state.generation, lambda now: now.ttl_seconds == 4.0) is None
    assert log.expire("a", "000000000007", lambda now: True) is None
    assert log.expire("a", state.generation, lambda now: now.ttl_seconds == 5.0) == state.generation
    assert log.load("a") is None
    found = commit_log(store).expired("a", state.generation, GRACE_SECONDS)
    assert found
    assert (found.ttl_seconds, [entry.digest for entry in log.appends(found)]) == (
        5.0,
        [entry.digest for entry in log.appends(state)],
    )
    assert log.superseded(found)
    late = CommitLog(store, TENANT, lambda: CLOCK_SECONDS + GRACE_SECONDS)
    assert late.expired("a", state.generation, GRACE_SECONDS) is None
    assert collect(store, later_seconds=GRACE_SECONDS - 1) == 0
    assert collect(store) == 3


@pytest.mark.parametrize("generation", [FIRST, "000000000001", "000000000009"])
def test_a_deleted_or_unknown_generation_is_not_an_expired_one(log: CommitLog, generation: str) -> None:
    three_appends(log)
    log.delete("a")
    created(log)
    assert log.expired("a", generation, GRACE_SECONDS) is None
    assert loaded(log).generation == "000000000002"
