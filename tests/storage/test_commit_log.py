"""Appends: one winner for each position, repeats recognised, a constant price."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch

from kvstore_server.errors import (
    Aborted,
    AlreadyExists,
    OutOfRange,
    Unavailable,
)
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.meta_log import ATTEMPTS
from kvstore_server.storage.store import Buffer

from .inputs import (
    SHAPE,
    append,
    assert_equal_rows,
    commit_log,
    created,
    loaded,
    next_segment,
    random_fit,
)
from .memory_store import MemoryStore


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
    assert store.calls == ["get_range", "list_keys"]


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


class FarAway(MemoryStore):
    """Each read takes a while; `at_once` is how many were under way together."""

    reads_at_once = 8
    at_once = _reading = 0

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._slowly(super().get_range(key, start, end))

    def get(self, key: str) -> bytes:
        return self._slowly(super().get(key))

    def _slowly(self, data: bytes) -> bytes:
        self._reading += 1
        self.at_once = max(self.at_once, self._reading)
        time.sleep(0.01)
        self._reading -= 1
        return data


def test_a_log_that_is_far_away_is_read_many_at_a_time_and_in_order() -> None:
    store = FarAway()
    log = commit_log(store)
    state = created(log)
    for seed in range(40):
        append(log, state, 1 + seed % 3, seed=seed)
    store.at_once = 0
    found = loaded(log)
    assert found.entries == state.entries
    assert 4 < store.at_once <= store.reads_at_once
    store.at_once = 0
    read = [segment.header.digest for segment, _ in log.inspect_all(found, log.appends(found))]
    assert read == [entry.digest for entry in log.appends(state)]
    assert 4 < store.at_once <= store.reads_at_once


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
