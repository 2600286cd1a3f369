"""Every order in which the store calls of concurrent actors can happen, and what each actor may then claim.

An actor is a function of a store. It is run again from its start for every step, with its earlier calls answered from
the record, so that all orders are reached without threads; states that were reached before are not visited twice.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore_server.errors import DataLoss, KVStoreError
from kvstore_server.storage import commit_log as commit_log_module
from kvstore_server.storage import merging, meta_log
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.commit_log import AlreadyPresent, Committed
from kvstore_server.storage.keys import log_folder, refs_folder
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.segment import Segment, write_segment
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Buffer, ObjectStore

from .facts import facts_of
from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT, append, commit_log, next_segment
from .memory_store import MemoryStore
from .records import of_newer_version

Objects = dict[str, bytes]
Answers = tuple[Any, ...]
Actor = Callable[[ObjectStore], Any]


class Suspended(BaseException):
    """The actor made its one new call and asks for the next."""


class Replay:
    """A store that answers the first calls from the record, makes one new call, and stops at the one after it."""

    reads_at_once = 1

    def __init__(self, objects: Objects, answers: Answers) -> None:
        self.store = MemoryStore(objects)
        self.answers = answers
        self._given = iter(answers)
        self._fresh = True

    def _call(self, name: str, *arguments: Any) -> Any:
        for answer in self._given:
            return self._result(answer)
        if not self._fresh:
            raise Suspended
        self._fresh = False
        try:
            answer = getattr(self.store, name)(*arguments)
            answer = tuple(answer) if isinstance(answer, list) else answer
        except KeyError as error:
            answer = error.args
            answer = KeyError, *answer
        self.answers += (answer,)
        return self._result(answer)

    @staticmethod
    def _result(answer: Any) -> Any:
        if isinstance(answer, tuple):
            if answer[:1] == (KeyError,):
                raise KeyError(*answer[1:])
            return list(answer)
        return answer

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        return self._call("put_if_absent", key, parts)

    def get(self, key: str) -> bytes:
        return self._call("get", key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._call("get_range", key, start, end)

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        return self._call("list_keys", prefix, start_after)

    def list_folders(self, prefix: str) -> list[str]:
        return self._call("list_folders", prefix)

    def size(self, key: str) -> int:
        return self._call("size", key)

    def delete(self, key: str) -> None:
        return self._call("delete", key)

    def probe(self) -> None:
        return


@dataclass(frozen=True)
class Outcome:
    """What an actor answered, and what the store held at that moment."""

    answer: Any
    objects: Objects


Check = Callable[[dict[str, Outcome]], None]


@dataclass
class Explorer:
    """`checks` sees the outcomes so far each time an actor is done; it raises Violation."""

    actors: dict[str, Actor]
    check: Check
    states: int = 0
    _seen: set[Any] = field(default_factory=set)

    def run(self, objects: Objects) -> int:
        """How many different states were reached."""
        self._visit(objects, dict.fromkeys(self.actors, ()), {})
        return self.states

    def _visit(self, objects: Objects, answers: dict[str, Answers], outcomes: dict[str, Outcome]) -> None:
        state = (frozenset(objects.items()), tuple(answers.items()), frozenset(outcomes))
        if state in self._seen:
            return
        self._seen.add(state)
        self.states += 1
        for name, actor in self.actors.items():
            if name not in outcomes:
                self._step(name, actor, dict(objects), answers, outcomes)

    def _step(
        self,
        name: str,
        actor: Actor,
        objects: Objects,
        answers: dict[str, Answers],
        outcomes: dict[str, Outcome],
    ) -> None:
        replay = Replay(objects, answers[name])
        nonces = itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(meta_log.secrets, "token_hex", lambda size: f"{name}{next(nonces)}")
            try:
                answer = actor(replay)
            except Suspended:
                answer = None
            except KVStoreError as error:
                answer = error
        if answer is not None:
            outcomes = {**outcomes, name: Outcome(answer, objects)}
            self.check(outcomes)
        self._visit(objects, {**answers, name: replay.answers}, outcomes)


class Violation(AssertionError):
    """An actor claimed what is not so."""


# ---- actors


def living(store: ObjectStore, name: str = "a") -> SessionState | None:
    state = commit_log(store).load(name)
    if state is not None:
        commit_log(store).appends(state)
    return state


def writer(seed: int) -> Actor:
    """Appends once to the session as it finds it."""

    def act(store: ObjectStore) -> Any:
        state = living(store)
        return append(commit_log(store), state, seed=seed) if state else "nothing there"

    return act


def deleter(store: ObjectStore) -> Any:
    return commit_log(store).delete("a") or "nothing there"


def recreator(store: ObjectStore) -> Any:
    """Deletes the session, creates the name again and appends to it."""
    log = commit_log(store)
    log.delete("a")
    state, _ = log.create("a", SHAPE, SPEC)
    return append(log, state, seed=77)


def forker(store: ObjectStore) -> Any:
    state = living(store)
    return commit_log(store).fork(state, 1, "child")[0] if state else "nothing there"


def collector(store: ObjectStore) -> Any:
    """Removes what a deleted generation left, as soon as it may."""
    Collector(store, TENANT, 0.0, lambda: CLOCK_SECONDS).collect("a")
    return "collected"


def merger(store: ObjectStore) -> Any:
    """Merges what it finds."""
    state = living(store)
    if state is None:
        return "nothing there"
    return Merger(store, TENANT, MergeBounds(2, 1 << 20), lambda: CLOCK_SECONDS).merge(state) or "nothing merged"


def reader(store: ObjectStore) -> Any:
    """Reads every append to its last byte."""
    state = living(store)
    if state is None:
        return "nothing there"
    log = commit_log(store)
    return tuple((entry.start, entry.digest) for entry in log.appends(state) if log.read(state, entry))


def child_reader(store: ObjectStore) -> Any:
    """As reader, of the session `child`."""
    log = commit_log(store)
    state = log.load("child")
    assert state
    return tuple((entry.start, entry.digest) for entry in log.appends(state) if log.read(state, entry))


def newer_version(store: ObjectStore) -> Any:
    """A newer version publishes a record that this one cannot read."""
    store.put_if_absent(f"{TENANT}/a/meta/000000000001.json", [of_newer_version("a", 1)])
    return "published"


# ---- what must hold


def acknowledged(outcome: Outcome) -> bool:
    return isinstance(outcome.answer, Committed | AlreadyPresent)


def check_appends(outcomes: dict[str, Outcome]) -> None:
    """Whoever is told that an append is there can read it at that moment; each position has one winner."""
    winners: dict[tuple[str, str, int], str] = {}
    for name, outcome in outcomes.items():
        if not acknowledged(outcome):
            continue
        entry = outcome.answer.entry
        found = facts_of(MemoryStore(dict(outcome.objects))).get(entry.session)
        here = (entry.start, entry.end, entry.digest)
        if found is None or found.generation != entry.generation or here not in found.appends:
            raise Violation(f"{name} was told {here} of {entry.generation}, a reader finds {found}")
        position = entry.session, entry.generation, entry.start
        if winners.setdefault(position, entry.digest) != entry.digest:
            raise Violation(f"two winners at {position}")
    committed = [o.answer.entry.key for o in outcomes.values() if isinstance(o.answer, Committed)]
    if len(committed) != len(set(committed)):
        raise Violation("one object was committed twice")


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


def check_merging(outcomes: dict[str, Outcome]) -> None:
    """As check_appends, and no reader misses or mistakes what was there before."""
    check_appends(outcomes)
    for name, outcome in outcomes.items():
        if "read" in name and outcome.answer[:2] != TWO_APPENDS:
            raise Violation(f"{name} finds {outcome.answer}")
        found = facts_of(MemoryStore(dict(outcome.objects))).get("a")
        if found is not None and tuple((start, digest) for start, _, digest in found.appends[:2]) != TWO_APPENDS:
            raise Violation(f"when {name} was done: {found}")


@pytest.fixture
def one_append(parse_once: None, monkeypatch: pytest.MonkeyPatch) -> Objects:
    """A session with one append, and segments that are written once."""
    written: dict[tuple[Any, ...], list[Buffer]] = {}

    def write_once(segment: Segment) -> list[Buffer]:
        key = (segment.header.identity, segment.header.digest, segment.header.previous_digest)
        return written.setdefault(key, [b"".join(write_segment(segment))])

    monkeypatch.setattr(commit_log_module, "write_segment", write_once)
    monkeypatch.setattr(merging, "write_segment", write_once)
    store = MemoryStore()
    log = commit_log(store)
    state, _ = log.create("a", SHAPE, SPEC)
    append(log, state, seed=50)
    return store.objects


RACES: dict[str, dict[str, Actor]] = {
    "two writers and a deleter": {"one": writer(1), "two": writer(2), "delete": deleter},
    "two writers of equal bytes and a deleter": {"one": writer(1), "two": writer(1), "delete": deleter},
    "a writer and a name that comes back": {"one": writer(1), "again": recreator},
    "two deleters and a writer": {"one": writer(1), "delete": deleter, "other": deleter},
    "two names that come back": {"again": recreator, "other": recreator},
}


@pytest.mark.parametrize("race", RACES)
def test_no_order_of_calls_gives_a_lost_append_or_two_winners(race: str, one_append: Objects) -> None:
    assert Explorer(RACES[race], check_appends).run(one_append) > 20


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
    assert Explorer(FORKS, check_fork).run(one_append) > 20


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


# ---- merging


def digest_of(seed: int) -> str:
    log = commit_log(MemoryStore())
    return next_segment(log, log.create("a", SHAPE, SPEC)[0], seed=seed).header.digest


TWO_APPENDS = ((0, digest_of(50)), (1, digest_of(51)))


@pytest.fixture
def two_appends(one_append: Objects) -> Objects:
    """Also a fork of both."""
    log, state = commit_log(MemoryStore(one_append)), living(MemoryStore(one_append))
    assert state
    append(log, state, seed=51)
    log.fork(state, 2, "child")
    return one_append


def late(actor: Callable[[ObjectStore, SessionState], Any], known: Objects) -> Actor:
    """An actor that read the session when only `known` was there, and has slept since."""

    def act(store: ObjectStore) -> Any:
        state = living(MemoryStore(dict(known)))
        assert state
        return actor(store, state)

    return act


def appends_late(seed: int) -> Callable[[ObjectStore, SessionState], Any]:
    return lambda store, state: append(commit_log(store), state, seed=seed)


def merging_races(one: Objects) -> dict[str, dict[str, Actor]]:
    merge_and_collect: dict[str, Actor] = {"merge": merger, "collect": collector}
    return {
        "a writer": {"one": writer(1), **merge_and_collect},
        "a reader": {"read": reader, **merge_and_collect},
        "a reader of a fork": {"read child": child_reader, **merge_and_collect},
        "a writer who knows one append": {"late": late(appends_late(1), one), **merge_and_collect},
        "a writer who sends again what it knows not to be there": {
            "late": late(appends_late(51), one),
            **merge_and_collect,
        },
        "two writers who know one append and a reader": {
            "late": late(appends_late(1), one),
            "later": late(appends_late(2), one),
            "merge and collect": lambda store: (merger(store), collector(store)),
            "read": reader,
        },
        "two mergers and a writer": {"merge": merger, "other": merger, "one": writer(1)},
        "a deleter": {"delete": deleter, **merge_and_collect},
    }


@pytest.mark.parametrize("race", merging_races({}))
def test_no_order_of_calls_loses_an_append_to_merging(race: str, one_append: Objects, two_appends: Objects) -> None:
    one = {key: data for key, data in two_appends.items() if "000000000001" not in key and "child" not in key}
    assert Explorer(merging_races(one)[race], check_merging).run(dict(two_appends)) > 20
