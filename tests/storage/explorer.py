"""Every order in which the store calls of concurrent actors can happen, and what each actor may then claim.

An actor is a function of a store. It is run again from its start for every step, with its earlier calls answered from
the record, so that all orders are reached without threads; states that were reached before are not visited twice.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from kvstore_server.errors import KVStoreError
from kvstore_server.storage import meta_log
from kvstore_server.storage.collecting import Collector
from kvstore_server.storage.commit_log import AlreadyPresent, Committed
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Buffer, ObjectStore

from .facts import facts_of
from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT, append, commit_log
from .memory_store import MemoryStore

Objects = dict[str, bytes]
Answers = tuple[Any, ...]
Actor = Callable[[ObjectStore], Any]


class Suspended(BaseException):
    """The actor made its one new call and asks for the next."""


class Replay(ObjectStore):
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
