"""Sessions as logs: one winner for each position, repeats recognised, forks that share, names that never come back."""

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore_codecs.spec import CodecSpec
from kvstore_server.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    Unavailable,
)
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.meta import Ancestor
from kvstore_server.storage.meta_log import ATTEMPTS
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Buffer

from .inputs import (
    CLOCK_SECONDS,
    OTHER_SPEC,
    SHAPE,
    SPEC,
    append,
    assert_equal_rows,
    commit_log,
    next_segment,
    random_fit,
)
from .memory_store import MemoryStore
from .records import checkpoint


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def log(store: MemoryStore) -> CommitLog:
    return commit_log(store)


def created(log: CommitLog, name: str = "a", spec: CodecSpec = SPEC) -> SessionState:
    return log.create(name, SHAPE, spec)[0]


def loaded(log: CommitLog, name: str = "a") -> SessionState:
    state = log.load(name)
    assert state
    log.appends(state)
    return state


def log_key(start: int, name: str = "a", generation: int = 0) -> str:
    return f"default/{name}/{generation:012d}/log/{start:012d}.safetensors"


# ---- names


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
    store.objects["default/a/meta/000000000001.json"] = checkpoint("a", 1)
    with pytest.raises(FailedPrecondition):
        log.load("a")
    with pytest.raises(Unavailable):  # the object is there: nothing may say that it is not
        append(log, state)
    assert log.load("b")


# ---- appends


def test_appends_follow_each_other_and_are_read_back(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    segments = []
    for seed, tokens in enumerate((3, 1, 300)):
        segments.append(next_segment(log, state, tokens, seed=seed, block_hashes=(bytes([seed]) * 32,)))
        result = log.commit(state, segments[-1])
        assert isinstance(result, Committed)
        assert result.entry.stored_bytes == len(store.objects[result.entry.key])
    other = loaded(commit_log(store))
    assert other.length == state.length == 304
    assert other.entries == state.entries
    for segment, entry in zip(segments, log.appends(other), strict=True):
        assert_equal_rows(log.read(other, entry), segment)
        assert entry.block_hashes == segment.header.block_hashes


def test_the_fit_is_found_with_the_append_that_made_it(log: CommitLog) -> None:
    state = created(log)
    append(log, state, 9)
    fit = random_fit(SHAPE)
    log.commit(state, next_segment(log, state, 4, fit=fit))
    entries = log.appends(loaded(log))
    assert [entry.fit_range for entry in entries] == [None, (1, 9)]
    found = log.read(state, entries[1]).fit
    assert found
    assert torch.equal(found.mean_keys, fit.mean_keys)


def test_the_same_append_again_is_recognised_at_any_later_time(log: CommitLog) -> None:
    state = created(log)
    first = next_segment(log, state, 3)
    log.commit(state, first)
    for seed in range(3):
        append(log, state, 2, seed=seed)
    result = log.commit(state, first)
    assert isinstance(result, AlreadyPresent)
    assert result.entry == log.appends(state)[0]
    assert state.length == 9
    assert isinstance(log.commit(loaded(log), first), AlreadyPresent)


@pytest.mark.parametrize(("start", "tokens", "digest"), [(0, 3, "f" * 64), (0, 2, ""), (1, 2, ""), (3, 1, "f" * 64)])
def test_another_append_at_a_taken_position_is_refused(log: CommitLog, start: int, tokens: int, digest: str) -> None:
    state = created(log)
    append(log, state, 3)
    append(log, state, 1)
    digest = digest or state.entries[0].digest if state.entries else ""
    with pytest.raises(AlreadyExists) as caught:
        log.already_present(state, start, tokens, digest)
    assert caught.value.facts["length"] == "4"
    assert state.length == 4


def test_an_append_beyond_the_length_names_the_length(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    append(log, state, 3)
    with pytest.raises(OutOfRange) as caught:
        log.already_present(state, 5, 1, "0" * 64)
    assert caught.value.facts == {"length": "3"}


def test_a_state_that_is_behind_looks_once_before_it_refuses(log: CommitLog, store: MemoryStore) -> None:
    behind = created(log)
    ahead = loaded(commit_log(store))
    for seed in range(3):
        append(log, ahead, 2, seed=seed)
    assert log.already_present(behind, 6, 1, "0" * 64) is None
    assert behind.entries == ahead.entries
    append(log, ahead, 2, seed=9)
    assert log.discover(behind) == 8


def test_of_two_writers_at_one_position_the_second_learns_what_is_there(log: CommitLog, store: MemoryStore) -> None:
    one = created(log)
    other = loaded(commit_log(store))
    segment = next_segment(log, other, 2, seed=2)
    append(log, one, 3, seed=1)
    with pytest.raises(AlreadyExists) as caught:
        log.commit(other, segment)
    assert one.entries
    assert caught.value.facts == {"length": "3", "digest": one.entries[0].digest}
    assert other.length == 3
    assert isinstance(append(log, other, 2, seed=2), Committed)


def test_an_append_costs_the_same_number_of_calls_at_any_length(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    costs = set()
    for seed in range(50):
        store.calls.clear()
        append(log, state, seed=seed)
        costs.add(tuple(store.calls))
    assert costs == {("put_if_absent", "list_keys")}
    store.calls.clear()
    assert log.discover(state) == 50
    assert store.calls == ["list_keys", "get_range"]


def test_an_append_at_a_deleted_generation_is_aborted_and_never_seen_again(log: CommitLog, store: MemoryStore) -> None:
    stale = created(log)
    append(log, stale, 3)
    log.delete("a")
    with pytest.raises(Aborted):
        append(log, stale, 1)
    again = created(log)
    assert again.length == 0
    with pytest.raises(Aborted):
        append(log, stale, 1)
    assert log.appends(loaded(log)) == []


def test_a_repeat_at_a_deleted_generation_is_aborted(log: CommitLog) -> None:
    stale = created(log)
    segment = next_segment(log, stale, 3)
    log.commit(stale, segment)
    log.delete("a")
    with pytest.raises(Aborted):
        log.commit(stale, segment)


class LosesAnswers(MemoryStore):
    """Writes, then fails (`unavailable`) or denies having written, as after a retry inside (`denies`)."""

    fault = ""

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        created = super().put_if_absent(key, parts, urgent=urgent)
        if self.fault == "unavailable":
            self.fault = ""
            raise Unavailable("IO_ERROR", "no answer")
        return created and self.fault != "denies"


@pytest.mark.parametrize("fault", ["unavailable", "denies"])
def test_a_put_whose_answer_is_lost_is_recognised_as_ones_own(fault: str) -> None:
    store = LosesAnswers()
    log = commit_log(store)
    created(log, "b")
    store.fault = fault
    if fault == "unavailable":
        with pytest.raises(Unavailable):
            created(log)
    state = created(log)
    assert state.generation == "000000000000"
    segment = next_segment(log, state, 2)
    store.fault = fault
    if fault == "unavailable":
        with pytest.raises(Unavailable):
            log.commit(state, segment)
    assert isinstance(log.commit(state, segment), AlreadyPresent)
    assert log.delete("a") == state.generation


def test_a_writer_that_always_loses_the_next_record_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Contended(MemoryStore):
        tries = 0

        def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
            if "/meta/" in key and armed:
                self.tries += 1
                rival = loaded(commit_log(MemoryStore(self.objects)))
                commit_log(MemoryStore(self.objects)).update(rival, ttl_seconds=1.0, pinned=False)
            return super().put_if_absent(key, parts, urgent=urgent)

    armed = False
    store = Contended()
    log = commit_log(store)
    state = created(log)
    armed = True
    with pytest.raises(Unavailable):
        log.update(state, ttl_seconds=2.0, pinned=True)
    assert store.tries == ATTEMPTS


def test_a_segment_of_another_state_is_our_bug(log: CommitLog) -> None:
    state = created(log)
    with pytest.raises(ValueError, match="next of this state"):
        log.commit(state, next_segment(log, created(log, "b"), 2))


def test_a_segment_made_for_a_position_that_was_taken_meanwhile_is_not_put_elsewhere(
    log: CommitLog, store: MemoryStore
) -> None:
    state = created(log)
    append(log, loaded(commit_log(store)), 3)
    log.discover(state)
    segment = next_segment(log, state, 2, start=0)
    with pytest.raises(AlreadyExists):
        log.commit(state, segment)
    assert loaded(log).length == 3


def test_calls_on_one_state_from_many_threads_wait_for_each_other(log: CommitLog, store: MemoryStore) -> None:
    state = created(log)
    writer = loaded(commit_log(store))
    for seed in range(40):
        append(log, writer, seed=seed)
    threads = [threading.Thread(target=log.discover, args=(state,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert state.entries == writer.entries


# ---- damage


def three_appends(log: CommitLog) -> SessionState:
    state = created(log)
    for seed in range(3):
        append(log, state, 2, seed=seed)
    return state


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


# ---- forks


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


def test_at_most_64_sessions_share(log: CommitLog) -> None:
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


# ---- processes that share a disk


def test_two_racing_writers_fill_a_log_with_one_winner_each(tmp_path: Path) -> None:
    LocalStore(tmp_path)
    created(commit_log(LocalStore(tmp_path)))
    results: list[tuple[int, int]] = []

    def write(worker: int) -> None:
        log = commit_log(LocalStore(tmp_path))
        state = loaded(log)
        while state.length < 30:
            start = state.length
            with contextlib.suppress(AlreadyExists):
                log.commit(state, next_segment(log, state, seed=worker))
                results.append((start, worker))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log = commit_log(LocalStore(tmp_path))
    state = loaded(log)
    winners = dict(results)
    assert len(winners) == len(results) == state.length
    for entry in log.appends(state):
        digest = next_segment(log, state, seed=winners[entry.start]).header.digest
        assert log.read(state, entry).header.digest == digest


def test_two_writers_of_equal_bytes_are_both_right(tmp_path: Path) -> None:
    created(commit_log(LocalStore(tmp_path)))
    barrier = threading.Barrier(2)
    results: list[str] = []

    def write() -> None:
        log = commit_log(LocalStore(tmp_path))
        state = loaded(log)
        for seed in range(20):
            segment = next_segment(log, state, seed=seed)
            barrier.wait(30)
            results.append(type(log.commit(state, segment)).__name__)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 40
    assert results.count("Committed") == results.count("AlreadyPresent") == 20
