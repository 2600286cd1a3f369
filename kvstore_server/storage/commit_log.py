"""Sessions as two logs of put-if-absent objects: the one place that decides what is committed.

A put is a commit only if, after it, the meta log shows nothing newer that ends the generation. The rest follows from
names: `start` must equal the length, so every position has one winner, without a leader, a lease or a recovery.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    Unavailable,
)
from kvstore_server.storage.checksums import Damage, whole_damage
from kvstore_server.storage.container import DamagedError
from kvstore_server.storage.in_order import in_order
from kvstore_server.storage.keys import log_key, ref_key
from kvstore_server.storage.log_reader import read_entries, read_entry
from kvstore_server.storage.meta import ANCESTORS_MAX
from kvstore_server.storage.meta_log import MetaLog
from kvstore_server.storage.segment import Segment, data_loss, geometry_of, inspect_segment, write_segment
from kvstore_server.storage.segment_header import Encoder, Encoding, Identity, SegmentHeader
from kvstore_server.storage.session_state import AppendEntry, SessionState, entry_of, follows
from kvstore_server.storage.store import ObjectStore

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Committed:
    """This call's object is durable and everyone's next position is after it."""

    entry: AppendEntry


@dataclass(frozen=True)
class AlreadyPresent:
    """The same append was committed before."""

    entry: AppendEntry


def _serialised(
    method: Callable[Concatenate["CommitLog", SessionState, P], R],
) -> Callable[Concatenate["CommitLog", SessionState, P], R]:
    """One call on a state at a time: a caller that was cancelled may have left one behind in its thread."""

    @wraps(method)
    def alone(log: "CommitLog", state: SessionState, *arguments: P.args, **named: P.kwargs) -> R:
        with state.lock:
            return method(log, state, *arguments, **named)

    return alone


class CommitLog:
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

    def create(
        self,
        session: str,
        shape: ModelShape,
        spec: CodecSpec,
        *,
        ttl_seconds: float | None = None,
        pinned: bool = False,
    ) -> tuple[SessionState, bool]:
        """A new empty session, or the living one of that shape and spec (True); AlreadyExists if that differs."""
        state, present = self._meta.create(session, shape, spec, ttl_seconds=ttl_seconds, pinned=pinned)
        if not present:
            state.entries = []
        return state, present

    @_serialised
    def update(self, state: SessionState, *, ttl_seconds: float | None, pinned: bool) -> None:
        """Sets both attributes."""
        self._meta.update(state, ttl_seconds=ttl_seconds, pinned=pinned)

    def delete(self, session: str, generation: str | None = None) -> str | None:
        """Ends the living generation (only that one, if it is named); its name, None if there is nothing to delete."""
        return self._meta.delete(session, generation)

    def expire(self, session: str, generation: str, is_due: Callable[[SessionState], bool]) -> str | None:
        """As delete of a generation that nobody uses, if `is_due` still says so of its newest attributes."""
        return self._meta.expire(session, generation, is_due)

    def expired(self, session: str, generation: str, grace_seconds: float) -> SessionState | None:
        """A generation that expired less than `grace_seconds` ago, to be read only; its log is not read yet."""
        return self._meta.expired(session, generation, grace_seconds)

    @_serialised
    def superseded(self, state: SessionState) -> bool:
        """One look at the meta log: whether the generation is gone. Brings the attributes up to date."""
        try:
            self._meta.refresh(state)
        except Aborted:
            return True
        return False

    @_serialised
    def fork(
        self,
        source: SessionState,
        end: int,
        session: str,
        *,
        ttl_seconds: float | None = None,
        pinned: bool = False,
    ) -> tuple[SessionState, bool]:
        """A session that shares [0, end) of `source`, or the living one that does (True).

        Costs the same whatever the length. AlreadyExists if that name lives and differs; OutOfRange beyond the length;
        FailedPrecondition if more than 64 sessions would share.
        """
        if session == source.session:
            raise InvalidArgument("name", "is the source itself")
        self._reach(source, end)
        ancestors = source.shared(end)
        if len(ancestors) > ANCESTORS_MAX:
            text = f"a fork shares tokens of at most {ANCESTORS_MAX} sessions"
            raise FailedPrecondition("FORK_DEPTH", text, limit=ANCESTORS_MAX)

        def refer(generation: str) -> None:
            """Whoever collects what a delete leaves sees the references, or the delete is seen here."""
            for owner in ancestors:
                key = ref_key(self._tenant, owner.session, owner.generation, session, generation)
                self._store.put_if_absent(key, [b""])
            self._meta.refresh(source)

        state, present = self._meta.create(
            session,
            source.shape,
            source.spec,
            ttl_seconds=ttl_seconds,
            pinned=pinned,
            ancestors=ancestors,
            before_put=refer,
        )
        if not present:
            state.entries = source.shared_entries(end)
        return state, present

    @_serialised
    def appends(self, state: SessionState) -> list[AppendEntry]:
        """All appends in order, what is shared included; read from the store once, a copy after that."""
        return list(self._entries(state))

    @_serialised
    def discover(self, state: SessionState) -> int:
        """Looks for appends beyond those known and for newer meta records; the length.

        DataLoss if the next object is there and cannot be trusted.
        """
        self._meta.refresh(state)
        self._entries(state)
        while True:
            identity = self._next(state)
            try:
                entry = read_entry(self._store, identity)
            except KeyError:
                return state.length
            except DamagedError as error:
                raise data_loss(identity, _unknown_length(identity, str(error))) from error
            self._extend(state, entry)

    @_serialised
    def segment(
        self,
        state: SessionState,
        *,
        tokens: int,
        exact: int,
        digest: str,
        encoding: Encoding,
        encoded_by: Encoder,
        keys: tuple[KindRows, ...],
        values: tuple[KindRows, ...],
        fit: Fit | None = None,
        block_hashes: tuple[bytes, ...] = (),
        block_tokens: int = 0,
        start: int | None = None,
    ) -> Segment:
        """The next append of `state`, not committed. `fit` only if this append made it.

        `start` is where the caller believes that the session ends: commit refuses the segment if it no longer does.
        """
        if tokens < 1:
            raise ValueError("an append has at least one token")
        last, identity = self._last(state), self._next(state)
        header = SegmentHeader(
            identity=identity if start is None else replace(identity, start=start),
            geometry=geometry_of(tokens, exact, state.shape.dtype, keys, values, fit),
            previous=last.start if last else None,
            previous_digest=last.digest if last else "",
            digest=digest,
            encoding=encoding,
            encoded_by=encoded_by,
            codec_fingerprint=state.spec.fingerprint,
            shape_fingerprint=state.shape.fingerprint,
            fit_range=(fit.token_start, fit.token_end) if fit else None,
            block_hashes=block_hashes,
            block_tokens=block_tokens,
            created_unix_seconds=self._clock(),
        )
        return Segment(header, keys, values, fit)

    @_serialised
    def already_present(self, state: SessionState, start: int, tokens: int, digest: str) -> AlreadyPresent | None:
        """None if `start` is the length. Looks at the store only if it is not.

        Below it, the same append again is AlreadyPresent and another one raises AlreadyExists; beyond it, OutOfRange
        names the length.
        """
        self._reach(state, start)
        if start == state.length:
            return None
        self._meta.refresh(state)
        entries = self._entries(state)
        index = bisect_left(entries, start, key=lambda entry: entry.start)
        found = entries[index] if index < len(entries) else None
        return self._compare(state, found, start, tokens, digest)

    @_serialised
    def commit(self, state: SessionState, segment: Segment) -> Committed | AlreadyPresent:
        """Makes the append durable, in a constant number of store calls; see already_present for what else may come.

        Unavailable: the outcome is unknown, and the same call again settles it.
        """
        header = segment.header
        present = self.already_present(state, header.start, header.tokens, header.digest)
        if present is not None:
            return present
        parts = write_segment(segment)
        key = log_key(self._tenant, state.session, state.generation, header.start)
        entry = entry_of(key, header, sum(map(len, parts)))
        if header.identity != self._next(state) or not follows(entry, self._last(state)):
            raise ValueError("the segment was not made as the next of this state")
        won = self._store.put_if_absent(key, parts)
        if not won:
            entry = self._winner(state)
        self._meta.confirm(state)
        self._extend(state, entry)
        if won:
            return Committed(entry)
        return self._compare(state, entry, header.start, header.tokens, header.digest)

    def read(self, state: SessionState, entry: AppendEntry) -> Segment:
        """The whole append, even if less of it is shared; DataLoss naming the range if any of it is damaged."""
        segment, damages = self.inspect(state, entry)
        if damages:
            raise data_loss(entry.identity(self._tenant), damages[0])
        return segment

    def read_all(self, state: SessionState, entries: Sequence[AppendEntry]) -> Iterator[Segment]:
        """As read, of each in order; where the store is far away, several are read ahead."""
        return in_order(partial(self.read, state), entries, self._store.reads_at_once)

    def inspect(self, state: SessionState, entry: AppendEntry) -> tuple[Segment, list[Damage]]:
        """As read, but lists damaged pages, so that all others may be used; DataLoss if none may."""
        identity = entry.identity(self._tenant)
        try:
            if entry.damage:
                raise DamagedError(entry.damage)
            segment, damages = inspect_segment(self._store.get(entry.key), identity)
            if (segment.header.tokens, segment.header.digest) != (entry.tokens, entry.digest):
                raise DamagedError("another append")
        except (DamagedError, KeyError) as error:
            with state.lock:
                self._meta.refresh(state)  # Aborted if the object is gone because the session is
            what = "missing" if isinstance(error, KeyError) else str(error)
            raise data_loss(identity, whole_damage(entry.start, entry.end, what)) from error
        return segment, damages

    def _entries(self, state: SessionState) -> list[AppendEntry]:
        if state.entries is None:
            state.entries = read_entries(self._store, state)
        return state.entries

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

    def _winner(self, state: SessionState) -> AppendEntry:
        """The append that took the next position before us."""
        identity = self._next(state)
        try:
            return read_entry(self._store, identity)
        except KeyError:
            self._meta.confirm(state)
            raise Unavailable("OUTCOME_UNKNOWN", "the object that was in the way is gone") from None
        except DamagedError as error:
            raise data_loss(identity, _unknown_length(identity, str(error))) from error

    def _compare(
        self, state: SessionState, entry: AppendEntry | None, start: int, tokens: int, digest: str
    ) -> AlreadyPresent:
        if entry is not None and entry.start == start:
            if entry.damage:
                raise data_loss(entry.identity(self._tenant), whole_damage(start, entry.end, entry.damage))
            if (entry.tokens, entry.end, entry.digest) == (tokens, start + tokens, digest):
                return AlreadyPresent(entry)
        text = f"another append holds position {start}; the length is {state.length}"
        found = entry.digest if entry is not None and entry.start == start else ""
        raise AlreadyExists("POSITION_TAKEN", text, length=state.length, digest=found)


def _unknown_length(identity: Identity, what: str) -> Damage:
    """What cannot be read does not say how long it is."""
    return whole_damage(identity.start, identity.start + 1, what)
