"""A name: who lives under it, who may change that, and that it never comes back as what it was."""

from dataclasses import replace

import pytest

from kvstore_server.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    Unavailable,
)
from kvstore_server.storage.commit_log import CommitLog

from .inputs import (
    CLOCK_SECONDS,
    OTHER_SPEC,
    SHAPE,
    SPEC,
    append,
    commit_log,
    created,
    loaded,
)
from .memory_store import MemoryStore
from .records import of_newer_version


def test_a_created_session_is_found_with_all_its_facts(log: CommitLog, store: MemoryStore) -> None:
    state, present = log.create("a", SHAPE, SPEC, ttl_seconds=60, pinned=True)
    assert not present
    found = log.load("a")
    assert found
    assert found == replace(state, entries=None)
    assert (found.generation, found.spec, found.shape) == ("000000000000", SPEC, SHAPE)
    assert (found.ttl_seconds, found.pinned, found.created_unix_seconds) == (60, True, CLOCK_SECONDS)
    assert log.sessions() == ["a"]
    assert log.load("b") is None
    assert commit_log(MemoryStore(store.objects)).load("a") == found


def test_creating_an_equal_session_again_changes_nothing(log: CommitLog, store: MemoryStore) -> None:
    created(log)
    append(log, loaded(log))
    before = dict(store.objects)
    state, present = log.create("a", SHAPE, SPEC, ttl_seconds=5)
    assert present
    assert log.appends(state)[0].tokens == 1
    assert store.objects == before


@pytest.mark.parametrize("change", [{"spec": OTHER_SPEC}, {"shape": SHAPE.model_copy(update={"layers": 3})}])
def test_creating_another_session_under_a_living_name_is_refused(log: CommitLog, change: dict) -> None:
    created(log)
    with pytest.raises(AlreadyExists):
        log.create("a", **{"shape": SHAPE, "spec": SPEC, **change})


def test_a_name_that_comes_back_is_another_generation(log: CommitLog) -> None:
    state = created(log)
    append(log, state, 3)
    assert log.delete("a") == state.generation
    assert log.load("a") is None
    again = created(log, spec=OTHER_SPEC)
    assert again.generation == "000000000002"
    assert log.appends(loaded(log)) == []


def test_delete_says_what_it_ended(log: CommitLog) -> None:
    assert log.delete("a") is None
    state = created(log)
    assert log.delete("a", "000000000007") is None
    assert log.load("a")
    assert log.delete("a", state.generation) == state.generation
    assert log.delete("a") is None


def test_attributes_are_replaced_and_survive(log: CommitLog) -> None:
    state = created(log)
    log.update(state, ttl_seconds=5.0, pinned=True)
    log.update(state, ttl_seconds=None, pinned=False)
    log.update(state, ttl_seconds=7.0, pinned=False)
    assert (state.ttl_seconds, state.pinned, state.seq) == (7.0, False, 3)
    assert log.load("a") == replace(state, entries=None)


def test_a_stale_state_learns_new_attributes_and_the_end_of_its_generation(log: CommitLog) -> None:
    stale = created(log)
    log.update(loaded(log), ttl_seconds=5.0, pinned=True)
    assert not log.superseded(stale)
    assert (stale.ttl_seconds, stale.pinned) == (5.0, True)
    log.update(stale, ttl_seconds=9.0, pinned=True)
    log.delete("a")
    assert log.superseded(stale)
    with pytest.raises(Aborted):
        log.update(stale, ttl_seconds=1.0, pinned=False)
    created(log)
    assert log.superseded(stale)
    for call in (lambda: append(log, stale), lambda: log.discover(stale), lambda: log.fork(stale, 0, "b")):
        with pytest.raises(Aborted):
            call()


@pytest.mark.parametrize("name", ["", "_keys", "..", "a/b", "a\0", "é", "x" * 129, ".hidden"])
def test_names_that_are_not_allowed_reach_no_store(log: CommitLog, store: MemoryStore, name: str) -> None:
    for call in (lambda: log.load(name), lambda: log.create(name, SHAPE, SPEC), lambda: log.delete(name)):
        with pytest.raises(InvalidArgument):
            call()
    assert store.calls == []


def test_a_missing_record_is_data_loss_but_what_lies_before_a_delete_may_go(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    log.update(state, ttl_seconds=5.0, pinned=True)
    log.update(state, ttl_seconds=6.0, pinned=True)
    record = store.objects.pop("default/a/meta/000000000001.json")
    with pytest.raises(DataLoss):
        log.load("a")
    store.objects["default/a/meta/000000000001.json"] = record
    log.delete("a")
    for seq in range(3):
        del store.objects[f"default/a/meta/{seq:012d}.json"]
    assert log.load("a") is None
    assert created(log).generation == "000000000004"


def test_a_record_of_a_newer_version_makes_only_its_session_unreadable(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    created(log, "b")
    store.objects["default/a/meta/000000000001.json"] = of_newer_version("a", 1)
    with pytest.raises(FailedPrecondition):
        log.load("a")
    with pytest.raises(Unavailable):  # the object is there: nothing may say that it is not
        append(log, state)
    assert log.load("b")
