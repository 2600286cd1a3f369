"""Merging and collecting beside everything else, in every order of the store's calls."""

from collections.abc import Callable
from typing import Any

import pytest

from kvstore_server.errors import KVStoreError
from kvstore_server.storage import collecting
from kvstore_server.storage import commit_log as commit_log_module
from kvstore_server.storage.log_reader import read_entries
from kvstore_server.storage.log_view import LogView
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.session_state import AppendEntry, SessionState
from kvstore_server.storage.store import ObjectStore

from ..faults.tally import WHOLE_SUITE
from .explorer import (
    Actor,
    Explorer,
    Objects,
    Outcome,
    Violation,
    check_appends,
    collector,
    deleter,
    living,
    writer,
)
from .facts import facts_of
from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT, append, commit_log, next_segment
from .memory_store import MemoryStore

BOUNDS = MergeBounds(objects_min=2, object_bytes_max=1 << 20)


def digest_of(seed: int) -> str:
    log = commit_log(MemoryStore())
    return next_segment(log, log.create("a", SHAPE, SPEC)[0], seed=seed).header.digest


TWO_APPENDS = ((0, digest_of(50)), (1, digest_of(51)))


@pytest.fixture
def two_appends(one_append: Objects) -> Objects:
    """Also a fork of both."""
    store = MemoryStore(dict(one_append))
    state = living(store)
    assert state
    append(commit_log(store), state, seed=51)
    commit_log(store).fork(state, 2, "child")
    return store.objects


def merger(store: ObjectStore) -> Any:
    """Merges what it finds."""
    state = living(store)
    if state is None:
        return "nothing there"
    return Merger(store, TENANT, BOUNDS, lambda: CLOCK_SECONDS).merge(state) or "nothing merged"


def reader(store: ObjectStore, name: str = "a") -> Any:
    """Reads every append to its last byte."""
    state = living(store, name)
    if state is None:
        return "nothing there"
    log = commit_log(store)
    return tuple((entry.start, entry.digest) for entry in log.appends(state) if log.read(state, entry))


def late_writer(seed: int, known: Objects) -> Actor:
    """Appends to the session as it was when only `known` was there; it has slept since."""

    def act(store: ObjectStore) -> Any:
        state = living(MemoryStore(dict(known)))
        assert state
        return append(commit_log(store), state, seed=seed)

    return act


def check(outcomes: dict[str, Outcome]) -> None:
    """As check_appends, and no reader, then or before, misses or mistakes what was there at the start."""
    check_appends(outcomes)
    for name, outcome in outcomes.items():
        if "read" in name and (isinstance(outcome.answer, KVStoreError) or outcome.answer[:2] != TWO_APPENDS):
            raise Violation(f"{name} finds {outcome.answer}")
        try:
            found = facts_of(MemoryStore(dict(outcome.objects)))
        except (KVStoreError, KeyError) as error:
            raise Violation(f"when {name} was done: {error}") from error
        for session in found.values():
            if tuple((start, digest) for start, _, digest in session.appends[:2]) != TWO_APPENDS:
                raise Violation(f"when {name} was done: {session}")


def races(known: Objects) -> dict[str, dict[str, Actor]]:
    """`known` is the session with its first append."""
    both: dict[str, Actor] = {"merge": merger, "collect": collector}
    return {
        "a writer": {"one": writer(1), **both},
        "a reader": {"read": reader, **both},
        "a reader of a fork": {"read": lambda store: reader(store, "child"), **both},
        "a late writer": {"late": late_writer(1, known), **both},
        "a late writer of what is there": {"late": late_writer(51, known), **both},
        "two late writers": {
            "late": late_writer(1, known),
            "later": late_writer(2, known),
            "sweep": lambda store: (merger(store), collector(store)),
        },
        "a late writer and a reader": {
            "late": late_writer(1, known),
            "read": reader,
            "sweep": lambda store: (merger(store), collector(store)),
        },
        "a deleter": {"delete": deleter, **both},
        "two mergers": {"merge": merger, "other": merger},
        "two mergers and a writer": {"merge": merger, "other": merger, "one": writer(1)},
    }


LONG = {"two mergers and a writer", "a writer", "a deleter", "two late writers", "a late writer and a reader"}


def explore(race: str, one_append: Objects, two_appends: Objects) -> int:
    return Explorer(races(one_append)[race], check).run(dict(two_appends))


@pytest.mark.parametrize("race", [race for race in races({}) if WHOLE_SUITE or race not in LONG])
def test_no_order_of_calls_loses_an_append_to_merging(race: str, one_append: Objects, two_appends: Objects) -> None:
    assert explore(race, one_append, two_appends) > 20


def test_a_collector_never_takes_what_a_merger_is_about_to_name(one_append: Objects, two_appends: Objects) -> None:
    """It was merged before, so that the collector has a checkpoint to go by."""
    assert Explorer({"merge": merger, "collect": collector}, check).run(merged_once(two_appends)) > 20


def merged_once(objects: Objects) -> Objects:
    store = MemoryStore(dict(objects))
    merger(store)
    collector(store)
    state = living(store)
    assert state
    for seed in range(2):
        append(commit_log(store), state, seed=seed)
    return store.objects


# ---- planted bugs


def test_a_writer_who_does_not_ask_whether_its_position_was_merged_is_found(
    one_append: Objects, two_appends: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commit_log_module, "range_at", lambda merged, position: None)
    with pytest.raises(Violation):
        explore("a late writer", one_append, two_appends)


def test_a_reader_who_does_not_look_for_a_new_place_is_found(
    one_append: Objects, two_appends: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogView, "_moved", lambda log, state, entry: None)
    with pytest.raises(Violation):
        explore("a reader", one_append, two_appends)


@pytest.mark.parametrize("race", ["a reader", "a reader of a fork"])
def test_a_reader_who_believes_the_first_list_is_found(
    race: str, one_append: Objects, two_appends: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entries(log: LogView, state: SessionState) -> list[AppendEntry]:
        if state.entries is None:
            merged = {owner: log._meta.places(owner.session, owner.generation).merged for owner in state.ancestors}
            state.entries = read_entries(log._store, state, merged)
        return state.entries

    monkeypatch.setattr(LogView, "_entries", entries)
    with pytest.raises(Violation):
        explore(race, one_append, two_appends)


def test_a_merger_who_removes_before_its_checkpoint_is_there_is_found(
    one_append: Objects, two_appends: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish: Callable[..., bool] = MetaLog.checkpoint

    def checkpoint(meta: MetaLog, state: SessionState, *arguments: Any) -> bool:
        for entry in state.entries or []:
            meta._store.delete(entry.key)
        return publish(meta, state, *arguments)

    monkeypatch.setattr(MetaLog, "checkpoint", checkpoint)
    with pytest.raises(Violation):
        explore("a reader", one_append, two_appends)


def test_a_collector_who_takes_what_is_not_named_yet_is_found(
    one_append: Objects, two_appends: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "merged_seqs", lambda keys: [0 for _ in keys])
    with pytest.raises(Violation):
        Explorer({"merge": merger, "collect": collector}, check).run(merged_once(two_appends))
