"""The reading half of a session's log: what is known of it, brought up to date, and its objects.

What lies under a log name is an append only if, after it was read, no checkpoint is found that has its position: the
name may have become free when its append was merged, and a writer who had not heard of that may have taken it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from itertools import groupby
from threading import RLock
from typing import Concatenate, ParamSpec, TypeVar

from kvstore_server.errors import Aborted, DataLoss, OutOfRange, Unavailable
from kvstore_server.storage.checksums import Damage, whole_damage
from kvstore_server.storage.container import DamagedError
from kvstore_server.storage.in_order import in_order
from kvstore_server.storage.log_reader import read_after, read_entries
from kvstore_server.storage.meta_log import ATTEMPTS, MetaLog
from kvstore_server.storage.segment import Segment, data_loss, inspect_segment
from kvstore_server.storage.segment_header import Identity
from kvstore_server.storage.session_state import AppendEntry, SessionState, follows, move
from kvstore_server.storage.store import ObjectStore

P = ParamSpec("P")
R = TypeVar("R")
Log = TypeVar("Log", bound="LogView")


def serialised(
    method: Callable[Concatenate[Log, SessionState, P], R],
) -> Callable[Concatenate[Log, SessionState, P], R]:
    """One call on a state at a time: a caller that was cancelled may have left one behind in its thread."""

    @wraps(method)
    def alone(log: Log, state: SessionState, *arguments: P.args, **named: P.kwargs) -> R:
        with state.lock:
            return method(log, state, *arguments, **named)

    return alone


class LogView:
    """The sessions of one tenant. Blocking: callers run it in a worker thread; calls on one state wait for each other.

    Every method that takes a state raises Aborted once it finds that its generation is gone.
    """

    def __init__(self, store: ObjectStore, tenant: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._tenant, self._clock = store, tenant, clock
        self._meta = MetaLog(store, tenant, clock)

    def sessions(self) -> list[str]:
        """Every name that was ever used and whose records are there, sorted."""
        return self._store.list_folders(self._tenant)

    def load(self, session: str) -> SessionState | None:
        """The living generation of that name; its log is not read yet."""
        return self._meta.head(session).state

    def expired(self, session: str, generation: str, grace_seconds: float) -> SessionState | None:
        """A generation that expired less than `grace_seconds` ago, to be read only; its log is not read yet."""
        return self._meta.expired(session, generation, grace_seconds)

    @serialised
    def superseded(self, state: SessionState) -> bool:
        """One look at the meta log: whether the generation is gone. Brings the attributes up to date."""
        try:
            self._meta.refresh(state)
        except Aborted:
            return True
        return False

    @serialised
    def appends(self, state: SessionState) -> list[AppendEntry]:
        """All appends in order, what is shared included; read from the store once, a copy after that."""
        return list(self._entries(state))

    @serialised
    def discover(self, state: SessionState) -> int:
        """Looks for appends beyond those known and for newer meta records; the length.

        DataLoss if the next object is there and cannot be trusted.
        """
        self._entries(state)
        while True:
            found, damage = self._read_on(state)
            known = state.merged
            self._meta.refresh(state)
            if state.merged != known and any(each.end > state.length for each in state.merged):
                continue  # what was found may be of writers that came too late
            for entry in found:
                self._extend(state, entry)
            if damage is not None:
                raise damage
            return state.length

    def snapshot(self, state: SessionState) -> SessionState:
        """What is known now, to be changed on its own."""
        with state.lock:
            return replace(state, entries=list(self._entries(state)), lock=RLock())

    def read(self, state: SessionState, entry: AppendEntry) -> Segment:
        """The whole object that holds the append, other appends too; DataLoss if any of it is damaged."""
        segment, damages = self.inspect(state, entry)
        if damages:
            raise data_loss(entry.identity(self._tenant), damages[0])
        return segment

    def inspect_all(
        self, state: SessionState, entries: Sequence[AppendEntry]
    ) -> Iterator[tuple[Segment, list[Damage]]]:
        """The objects that hold these appends, in order; where the store is far away, several are read ahead."""
        firsts = [next(group) for _, group in groupby(entries, key=lambda entry: entry.key)]
        return in_order(partial(self.inspect, state), firsts, self._store.reads_at_once)

    def inspect(self, state: SessionState, entry: AppendEntry) -> tuple[Segment, list[Damage]]:
        """As read, but lists damaged pages, so that all others may be used; DataLoss if none may."""
        identity, end, digest = entry.of_object(self._tenant)
        try:
            if entry.damage:
                raise DamagedError(entry.damage)
            segment, damages = inspect_segment(self._store.get(entry.key), identity)
            if (segment.header.end, segment.header.digest) != (end, digest):
                raise DamagedError("another append")
        except (DamagedError, KeyError) as error:
            moved = self._moved(state, entry)
            if moved is not None:
                return self.inspect(state, moved)
            what = "missing" if isinstance(error, KeyError) else str(error)
            raise data_loss(identity, whole_damage(entry.start, entry.end, what)) from error
        return segment, damages

    @serialised
    def _moved(self, state: SessionState, entry: AppendEntry) -> AppendEntry | None:
        """The entry at its new place, if it was merged since; Aborted if it is gone because the session is."""
        lives = self._meta.catch_up(state)
        if entry.session != state.session or entry.generation != state.generation:
            places = self._meta.places(entry.session, entry.generation)
            state.share(places.floor)
            move(self._entries(state), self._tenant, entry.session, entry.generation, places.merged)
        found = state.at(entry.start)
        if found is not None and found.key != entry.key and not found.damage:
            return found
        if not lives:
            raise Aborted("GENERATION_GONE", f"generation {state.generation} is gone", session=state.session)
        return None

    def _entries(self, state: SessionState) -> list[AppendEntry]:
        """Read until nothing was merged meanwhile: only then every log name that was read is that of an append."""
        if state.entries is not None:
            return state.entries
        for _ in range(ATTEMPTS):
            places = {owner: self._meta.places(owner.session, owner.generation) for owner in state.ancestors}
            known = state.merged
            entries = read_entries(self._store, state, {owner: each.merged for owner, each in places.items()})
            self._meta.catch_up(state)
            if state.merged == known and all(self._meta.is_current(o.session, p) for o, p in places.items()):
                state.entries = entries
                for each in places.values():
                    state.share(each.floor)
                return entries
        raise Unavailable("CONTENDED", f"{ATTEMPTS} times something was merged while the log was read")

    def _last(self, state: SessionState) -> AppendEntry | None:
        entries = self._entries(state)
        return entries[-1] if entries else None

    def _next(self, state: SessionState) -> Identity:
        return Identity(self._tenant, state.session, state.generation, state.length)

    def _reach(self, state: SessionState, position: int) -> None:
        """OutOfRange if the session is shorter, after one look at the store."""
        self._entries(state)
        if position > state.length and position > self.discover(state):
            text = f"{position} is beyond the length {state.length}"
            raise OutOfRange("BEYOND_LENGTH", text, length=state.length)

    def _extend(self, state: SessionState, entry: AppendEntry) -> None:
        if not follows(entry, self._last(state)):
            identity = entry.identity(self._tenant)
            raise data_loss(identity, whole_damage(entry.start, entry.end, "of another history"))
        self._entries(state).append(entry)

    def _read_on(self, state: SessionState) -> tuple[list[AppendEntry], DataLoss | None]:
        """What is under the names after the known appends, up to the first that is free or damaged."""
        found: list[AppendEntry] = []
        while True:
            position = found[-1].end if found else state.length
            try:
                found += read_after(self._store, state, position)
            except KeyError:
                return found, None
            except DamagedError as error:
                identity = replace(self._next(state), start=position)
                return found, data_loss(identity, unknown_length(identity, str(error)))


def unknown_length(identity: Identity, what: str) -> Damage:
    """What cannot be read does not say how long it is."""
    return whole_damage(identity.start, identity.start + 1, what)
