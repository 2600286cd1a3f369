"""Forks share and go their own way, at any length and for the same price."""

import pytest

from kvstore_server.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
)
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.meta import Ancestor

from .inputs import (
    SHAPE,
    SPEC,
    append,
    commit_log,
    created,
    loaded,
    log_key,
    three_appends,
)
from .memory_store import MemoryStore


def test_a_fork_shares_and_goes_its_own_way(log: CommitLog, store: MemoryStore) -> None:
    parent = three_appends(log)
    child, present = log.fork(parent, 5, "b", ttl_seconds=3, pinned=True)
    assert not present
    append(log, child, 3, seed=8)
    append(log, parent, 1, seed=9)
    assert (child.length, parent.length, child.base) == (8, 7, 5)
    found = loaded(commit_log(store), "b")
    assert found == child
    assert (found.ttl_seconds, found.pinned, found.spec) == (3, True, parent.spec)
    assert [(e.session, e.start, e.end) for e in log.appends(found)] == [
        ("a", 0, 2),
        ("a", 2, 4),
        ("a", 4, 5),
        ("b", 5, 8),
    ]
    for entry in log.appends(found):
        log.read(found, entry)


def test_a_fork_outlives_its_parent(log: CommitLog, store: MemoryStore) -> None:
    parent = three_appends(log)
    log.fork(parent, 6, "b")
    log.delete("a")
    created(log)
    child = loaded(log, "b")
    assert child.length == 6
    for entry in log.appends(child):
        log.read(child, entry)
    assert "default/a/000000000000/refs/b/000000000000" in store.objects


def test_a_fork_of_a_fork_names_its_ancestors_flat(log: CommitLog, store: MemoryStore) -> None:
    root = three_appends(log)
    middle, _ = log.fork(root, 4, "b")
    append(log, middle, 4, seed=5)
    leaf, _ = log.fork(middle, 7, "c")
    short, _ = log.fork(middle, 3, "d")
    generation = "000000000000"
    assert leaf.ancestors == (
        Ancestor(session="a", generation=generation, end=4),
        Ancestor(session="b", generation=generation, end=7),
    )
    assert short.ancestors == (Ancestor(session="a", generation=generation, end=3),)
    assert {key for key in store.objects if "/refs/c/" in key} == {
        f"default/a/{generation}/refs/c/{generation}",
        f"default/b/{generation}/refs/c/{generation}",
    }
    append(log, leaf, 1, seed=6)
    assert loaded(log, "c") == leaf
    assert loaded(log, "d") == short
    assert loaded(log, "c").length == 8


def test_an_empty_fork_shares_nothing(log: CommitLog, store: MemoryStore) -> None:
    child, _ = log.fork(three_appends(log), 0, "b")
    assert child.ancestors == ()
    assert loaded(log, "b").length == 0


def test_forking_again_is_recognised_and_another_fork_refused(log: CommitLog) -> None:
    parent = three_appends(log)
    child, _ = log.fork(parent, 4, "b")
    append(log, child, 2)
    again, present = log.fork(loaded(log), 4, "b")
    assert present
    assert log.appends(again) == log.appends(child)
    for end, name in ((5, "b"), (4, "c")):
        if name == "c":
            log.create("c", SHAPE, SPEC)
        with pytest.raises(AlreadyExists):
            log.fork(parent, end, name)
    with pytest.raises(AlreadyExists):
        log.create("b", SHAPE, SPEC)
    with pytest.raises(InvalidArgument):
        log.fork(parent, 1, "a")


def test_a_fork_beyond_the_length_names_the_length_after_one_look(log: CommitLog, store: MemoryStore) -> None:
    behind = created(log)
    append(log, loaded(commit_log(store)), 3)
    with pytest.raises(OutOfRange) as caught:
        log.fork(behind, 4, "b")
    assert caught.value.facts == {"length": "3"}
    assert log.fork(behind, 3, "b")[0].length == 3


def test_the_cost_of_a_fork_does_not_grow_with_its_length(log: CommitLog, store: MemoryStore) -> None:
    parent = created(log)
    calls = []
    for name in "bcd":
        for seed in range(10):
            append(log, parent, seed=seed)
        store.calls.clear()
        log.fork(parent, parent.length, name)
        calls.append(list(store.calls))
    assert calls[0] == calls[1] == calls[2]


def test_a_retry_at_a_shared_position_is_recognised_only_if_all_of_it_is_shared(log: CommitLog) -> None:
    parent = three_appends(log)
    entries = log.appends(parent)
    child, _ = log.fork(parent, 3, "b")
    assert log.already_present(child, 0, 2, entries[0].digest)
    with pytest.raises(AlreadyExists):
        log.already_present(child, 2, 2, entries[1].digest)


def test_at_most_64_sessions_share() -> None:
    log = commit_log(MemoryStore())
    state = created(log, "s0")
    for number in range(64):
        append(log, state, seed=number)
        state, _ = log.fork(state, state.length, f"s{number + 1}")
    append(log, state)
    assert len(state.ancestors) == 64
    with pytest.raises(FailedPrecondition):
        log.fork(state, state.length, "more")
    assert log.fork(state, 64, "beside")[0].ancestors == state.ancestors
    assert loaded(log, "s64").length == 65


def test_what_a_fork_lost_with_its_parents_log_is_named(log: CommitLog, store: MemoryStore) -> None:
    log.fork(three_appends(log), 5, "b")
    del store.objects[log_key(4)]
    child = loaded(log, "b")
    entries = log.appends(child)
    assert [(entry.start, entry.end, entry.damage) for entry in entries[2:]] == [(4, 5, "missing")]
    del store.objects[log_key(0)]
    assert [entry.damage for entry in log.appends(loaded(log, "b"))] == ["missing", "", "missing"]
    for key in [key for key in store.objects if "/log/" in key]:
        del store.objects[key]
    assert [(e.start, e.end, e.damage) for e in log.appends(loaded(log, "b"))] == [(0, 5, "missing")]
