"""Writers, deleters, forks and collectors in every order of their calls."""

from collections.abc import Sequence
from typing import Any

import pytest

from kvstore_server.errors import DataLoss, KVStoreError
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.keys import log_folder, refs_folder
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.store import Buffer, ObjectStore

from ..faults.tally import TALLY
from .explorer import (
    Actor,
    Explorer,
    Objects,
    Outcome,
    Violation,
    acknowledged,
    check_appends,
    collector,
    deleter,
    forker,
    living,
    recreator,
    writer,
)
from .facts import facts_of
from .inputs import TENANT, commit_log, next_segment
from .memory_store import MemoryStore
from .records import of_newer_version


def newer_version(store: ObjectStore) -> Any:
    """A newer version publishes a record that this one cannot read."""
    store.put_if_absent(f"{TENANT}/a/meta/000000000001.json", [of_newer_version("a", 1)])
    return "published"


def check_fork(outcomes: dict[str, Outcome]) -> None:
    """Once a fork's record is there, what it shares stays, whatever comes after."""
    for name, outcome in outcomes.items():
        try:
            found = facts_of(MemoryStore(dict(outcome.objects))).get("child")
        except (DataLoss, KeyError) as error:
            raise Violation(f"when {name} was done: {error}") from error
        if found is not None and len(found.appends) != 1:
            raise Violation(f"when {name} was done: {found}")


def check_no_claim_over_unknown_records(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if acknowledged(outcome) and f"{TENANT}/a/meta/000000000001.json" in outcome.objects:
            raise Violation(f"{name} claims a commit that a newer version may have superseded")


RACES: dict[str, dict[str, Actor]] = {
    "two writers and a deleter": {"one": writer(1), "two": writer(2), "delete": deleter},
    "two writers of equal bytes and a deleter": {"one": writer(1), "two": writer(1), "delete": deleter},
    "a writer and a name that comes back": {"one": writer(1), "again": recreator},
    "two deleters and a writer": {"one": writer(1), "delete": deleter, "other": deleter},
    "two names that come back": {"again": recreator, "other": recreator},
}


def counted(states: int) -> None:
    """Of one race; a violation is an exception."""
    assert states > 20
    row = TALLY.row("every order of concurrent writers, states")
    row.cycles += 1
    row.operations += states


@pytest.mark.parametrize("race", RACES)
def test_no_order_of_calls_gives_a_lost_append_or_two_winners(race: str, one_append: Objects) -> None:
    counted(Explorer(RACES[race], check_appends).run(one_append))


@pytest.mark.parametrize("race", [race for race in RACES if "one" in RACES[race]])
def test_without_the_check_after_the_put_a_lost_append_is_found(
    race: str, one_append: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetaLog, "confirm", lambda log, state: None)
    with pytest.raises(Violation):
        Explorer(RACES[race], check_appends).run(one_append)


def test_a_store_that_overwrites_is_found(one_append: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(store: MemoryStore, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        store.objects[key] = b"".join(parts)
        return True

    monkeypatch.setattr(MemoryStore, "put_if_absent", overwrite)
    with pytest.raises(Violation):
        Explorer({"one": writer(1), "two": writer(2)}, check_appends).run(one_append)


FORKS: dict[str, Actor] = {"fork": forker, "delete": deleter, "collect": collector}


def test_no_order_of_calls_takes_from_a_fork_what_it_shares(one_append: Objects) -> None:
    counted(Explorer(FORKS, check_fork).run(one_append))


def test_a_fork_that_does_not_look_at_its_parent_again_is_found(
    one_append: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetaLog, "refresh", lambda log, state: None)
    with pytest.raises(Violation):
        Explorer(FORKS, check_fork).run(one_append)


def test_a_collector_that_does_not_settle_a_reference_without_a_fork_is_found(
    one_append: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetaLog, "settle_absent", lambda log, session, generation: False)
    with pytest.raises(Violation):
        Explorer(FORKS, check_fork).run(one_append)


def test_a_collector_that_looks_for_references_first_is_found(
    one_append: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(collector: Collector, session: str, generation: str) -> int:
        store: Any = collector._store
        refs = store.list_keys(refs_folder(TENANT, session, generation))
        if not refs and collector._is_over(session, generation):
            for key in store.list_keys(log_folder(TENANT, session, generation)):
                store.delete(key)
        return 0

    monkeypatch.setattr(Collector, "_collect", collect)
    with pytest.raises(Violation):
        Explorer(FORKS, check_fork).run(one_append)


def test_no_append_is_claimed_over_a_record_of_a_newer_version(one_append: Objects) -> None:
    actors = {"one": writer(1), "two": writer(2), "publish": newer_version}
    Explorer(actors, check_no_claim_over_unknown_records).run(one_append)


def test_a_writer_that_read_long_ago_is_aborted_in_every_order(one_append: Objects) -> None:
    """Its first calls are answered from before the name was deleted and created again."""
    store = MemoryStore(one_append)
    state = living(store)
    assert state
    segment = next_segment(commit_log(store), state, seed=1)
    recreator(store)
    with pytest.raises(KVStoreError) as caught:
        commit_log(store).commit(state, segment)
    assert caught.value.code == "ABORTED"
