"""What is missing, damaged or foreign is named, and nothing else is refused."""

import pytest

from kvstore_server.errors import (
    Aborted,
    DataLoss,
)
from kvstore_server.storage.commit_log import CommitLog, Committed

from .inputs import (
    append,
    commit_log,
    created,
    loaded,
    log_key,
    three_appends,
)
from .memory_store import MemoryStore


def test_a_missing_object_is_a_damaged_range_and_the_others_are_read(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    del store.objects[log_key(2)]
    state = loaded(log)
    entries = log.appends(state)
    assert [(e.start, e.end, bool(e.damage)) for e in entries] == [(0, 2, False), (2, 4, True), (4, 6, False)]
    log.read(state, entries[0])
    log.read(state, entries[2])
    with pytest.raises(DataLoss) as caught:
        log.read(state, entries[1])
    facts = {"session": "a", "generation": "000000000000", "token_start": "2", "token_end": "4"}
    assert caught.value.facts == facts
    with pytest.raises(DataLoss):
        log.already_present(state, 2, 2, "0" * 64)
    assert isinstance(append(log, state, 1), Committed)


def test_an_object_with_a_damaged_header_is_a_damaged_range(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    store.objects[log_key(2)] = store.objects[log_key(2)][:20] + b"?" + store.objects[log_key(2)][21:]
    state = loaded(log)
    assert [bool(entry.damage) for entry in log.appends(state)] == [False, True, False]
    assert state.length == 6


def test_a_damaged_last_object_ends_the_session_and_nothing_overwrites_it(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    store.objects[log_key(4)] = store.objects[log_key(4)][:100]
    state = loaded(log)
    assert state.length == 4
    for entry in log.appends(state):
        log.read(state, entry)
    for call in (lambda: log.discover(state), lambda: append(log, state, 2, seed=7)):
        with pytest.raises(DataLoss) as caught:
            call()
        assert caught.value.facts["token_start"] == "4"


def test_damage_below_the_header_is_found_when_it_is_read(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    store.objects[log_key(2)] = store.objects[log_key(2)][:-1] + b"?"
    state = loaded(log)
    entries = log.appends(state)
    assert not any(entry.damage for entry in entries)
    with pytest.raises(DataLoss):
        log.read(state, entries[1])
    assert [damage.layer for damage in log.inspect(state, entries[1])[1]] == [1]


def test_swapped_objects_are_two_damaged_ranges(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    store.objects[log_key(0)], store.objects[log_key(2)] = store.objects[log_key(2)], store.objects[log_key(0)]
    assert [bool(entry.damage) for entry in log.appends(loaded(log))] == [True, True, False]


def test_neither_of_two_objects_that_do_not_follow_each_other_is_trusted(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    append(log, state, 2, seed=3)
    elsewhere = MemoryStore()
    other = commit_log(elsewhere)
    append(other, created(other), 2, seed=7)
    store.objects[log_key(0)] = elsewhere.objects[log_key(0)]
    strange = "of another history"
    assert [entry.damage for entry in log.appends(loaded(log))] == [strange, strange, "", ""]


def test_overlapping_objects_are_data_loss(log: CommitLog, store: MemoryStore) -> None:
    three_appends(log)
    store.objects[log_key(3)] = store.objects[log_key(2)]
    with pytest.raises(DataLoss):
        loaded(log)


def test_an_object_that_is_gone_with_its_session_is_aborted(log: CommitLog, store: MemoryStore) -> None:
    state = three_appends(log)
    log.delete("a")
    del store.objects[log_key(0)]
    with pytest.raises(Aborted):
        log.read(state, log.appends(state)[0])
