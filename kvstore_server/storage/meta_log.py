"""The log of a session's name: who lives under it, since which record, with which attributes.

A record is appended at the next number after everything that was read, and only if that name is free: so each one was
decided on all before it, and at one number exactly one writer wins.
"""

import secrets
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.errors import Aborted, AlreadyExists, DataLoss, Unavailable
from kvstore_server.storage.keys import check_name, generation_name, meta_folder, meta_key, meta_seqs
from kvstore_server.storage.meta import (
    Ancestor,
    Attributes,
    Checkpoint,
    Create,
    Delete,
    Expire,
    Floor,
    MergedRange,
    Record,
    read_record,
    write_record,
)
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import ObjectStore

ATTEMPTS = 16
"""How often a writer that lost a number tries the next."""


class Head(NamedTuple):
    """The living generation, if any, and the number the next record takes."""

    state: SessionState | None
    next_seq: int


class Places(NamedTuple):
    """Where a generation's appends lie that are not under their log names, as of record `seq`; for ever, if None."""

    seq: int | None
    merged: tuple[MergedRange, ...]
    floor: Floor


class MetaLog:
    """The meta logs of one tenant. Blocking.

    Raises DataLoss if a record is damaged or missing, FailedPrecondition if a newer version wrote it.
    """

    def __init__(self, store: ObjectStore, tenant: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._tenant, self._clock = store, tenant, clock

    def head(self, session: str) -> Head:
        """Reads from the newest record back to one that has all attributes, and the one that created."""
        check_name("session", session)
        seqs = meta_seqs(self._store.list_keys(meta_folder(self._tenant, session)))
        if not seqs:
            return Head(None, 0)
        last = self._read(session, seqs[-1])
        if isinstance(last, Delete | Expire):
            return Head(None, seqs[-1] + 1)
        return Head(self._state(last), seqs[-1] + 1)

    def create(
        self,
        session: str,
        shape: ModelShape,
        spec: CodecSpec,
        *,
        ttl_seconds: float | None,
        pinned: bool,
        ancestors: tuple[Ancestor, ...] = (),
        before_put: Callable[[str], None] = lambda generation: None,
    ) -> tuple[SessionState, bool]:
        """A new generation, or the living one that equals it (True); AlreadyExists if that differs.

        `before_put` is told the generation that is about to be tried.
        """
        for _ in range(ATTEMPTS):
            state, seq = self.head(session)
            if state is not None:
                if (state.shape, state.spec, state.ancestors) != (shape, spec, ancestors):
                    raise AlreadyExists("SESSION_EXISTS", "a session of that name differs", session=session)
                return state, True
            before_put(generation_name(seq))
            record = Create(
                **self._stamp(session, seq),
                spec=spec,
                shape=shape,
                ttl_seconds=ttl_seconds,
                pinned=pinned,
                ancestors=ancestors,
            )
            if self._put(record):
                state = _state_of(record)
                self.confirm(state)
                return state, False
        raise _contended(session)

    def update(self, state: SessionState, *, ttl_seconds: float | None, pinned: bool) -> None:
        """Sets both; Aborted if the generation is gone."""
        for _ in range(ATTEMPTS):
            self.refresh(state)
            record = Attributes(
                **self._stamp(state.session, state.seq + 1),
                generation=state.generation,
                ttl_seconds=ttl_seconds,
                pinned=pinned,
            )
            if self._put(record):
                _apply(state, record)
                self.confirm(state)
                return
        raise _contended(state.session)

    def checkpoint(self, state: SessionState, writer: str, merged: tuple[MergedRange, ...], floor: Floor) -> bool:
        """Says where appends lie from now on, if nothing has happened to the session since `state` was read."""
        stamp = {**self._stamp(state.session, state.seq + 1), "writer": writer}
        record = Checkpoint(
            **stamp,
            generation=state.generation,
            ttl_seconds=state.ttl_seconds,
            pinned=state.pinned,
            merged=merged,
            floor=floor,
        )
        if not self._put(record):
            return False
        _apply(state, record)
        return True

    def places(self, session: str, generation: str) -> Places:
        """Of a generation, living or not."""
        state, end = self._life(session, generation)
        if state is None:
            return Places(None, (), (0, 0))
        return Places(None if end else state.seq, state.merged, state.own_floor)

    def is_current(self, session: str, places: Places) -> bool:
        """Whether nothing has come since."""
        if places.seq is None:
            return True
        after = meta_key(self._tenant, session, places.seq)
        return not self._store.list_keys(meta_folder(self._tenant, session), start_after=after)

    def checkpoints(self, session: str, generation: str) -> Iterator[Checkpoint]:
        """Those of a generation, living or not, newest first, read one by one."""
        for seq in range(self._last_seq(session, generation) or 0, int(generation), -1):
            record = self._read(session, seq)
            if isinstance(record, Checkpoint):
                yield record

    def delete(self, session: str, generation: str | None) -> str | None:
        """Ends the living generation (only that one, if it is named); its name, None if there is nothing to delete."""
        return self._end(Delete, session, generation)

    def expire(self, session: str, generation: str, is_due: Callable[[SessionState], bool]) -> str | None:
        """As delete, if its attributes are still such that it is due when the record is put."""
        return self._end(Expire, session, generation, is_due)

    def _end(
        self,
        kind: type[Delete | Expire],
        session: str,
        generation: str | None,
        is_due: Callable[[SessionState], bool] = lambda state: True,
    ) -> str | None:
        for _ in range(ATTEMPTS):
            state, seq = self.head(session)
            if state is None or generation not in (None, state.generation) or not is_due(state):
                return None
            if self._put(kind(**self._stamp(session, seq), generation=state.generation)):
                return state.generation
        raise _contended(session)

    def expired(self, session: str, generation: str, grace_seconds: float) -> SessionState | None:
        """A generation that expired less than `grace_seconds` ago."""
        state, end = self._life(session, generation)
        if isinstance(end, Expire) and self._clock() < end.created_unix_seconds + grace_seconds:
            return state
        return None

    def ended_unix_seconds(self, session: str, generation: str) -> float | None:
        """When it was deleted or expired; None while it lives."""
        end = self._life(session, generation)[1]
        return None if end is None else end.created_unix_seconds

    def shares(self, child: str, child_generation: str, session: str, generation: str) -> bool:
        """Whether the child was forked from that generation, directly or not."""
        state = self._life(child, child_generation)[0]
        owners = state.ancestors if state else ()
        return any((owner.session, owner.generation) == (session, generation) for owner in owners)

    def settle_absent(self, session: str, generation: str) -> bool:
        """True if that generation has no record: from now on it never can have one.

        Its number is taken by a record that deletes what never was.
        """
        record = Delete(**self._stamp(session, int(generation)), generation=generation)
        try:
            found = self._read(session, int(generation))
        except DataLoss:
            return self._put(record)
        return isinstance(found, Delete) and found.generation == generation

    def _life(self, session: str, generation: str) -> tuple[SessionState | None, Delete | Expire | None]:
        """The generation with its last attributes, and the record that ended it; None and None if it never was."""
        seq = self._last_seq(session, generation)
        if seq is None:
            return None, None
        last = self._read(session, seq)
        if not isinstance(last, Delete | Expire):
            return self._state(last), None
        if last.seq == int(generation):
            return None, None
        return self._state(self._read(session, seq - 1)), last

    def _last_seq(self, session: str, generation: str) -> int | None:
        """The last record of a generation, found by halves: records are in the order of their generations."""
        check_name("session", session)
        before = meta_key(self._tenant, session, int(generation) - 1) if int(generation) else ""
        seqs = meta_seqs(self._store.list_keys(meta_folder(self._tenant, session), start_after=before))
        if not seqs or seqs[0] != int(generation) or _generation_of(self._read(session, seqs[0])) != generation:
            return None
        newest = self._read(session, seqs[-1])
        if _generation_of(newest) == generation:
            return seqs[-1]
        return seqs[bisect_right(seqs, generation, key=lambda seq: _generation_of(self._read(session, seq))) - 1]

    def _state(self, last: Record) -> SessionState:
        """The generation as its record `last` leaves it."""
        created = last if isinstance(last, Create) else self._read(last.session, int(_generation_of(last)))
        if not isinstance(created, Create):
            text = f"session {last.session} was never created"
            raise DataLoss("META_DAMAGED", text, session=last.session, seq=created.seq)
        changes: list[Attributes | Checkpoint] = []
        while isinstance(last, Attributes | Checkpoint):
            changes.append(last)
            if isinstance(last, Checkpoint):
                break
            last = self._read(last.session, last.seq - 1)
        state = _state_of(created)
        for change in reversed(changes):
            _apply(state, change)
        return state

    def refresh(self, state: SessionState) -> None:
        """Reads the records after `state.seq` into it; Aborted if the generation is gone."""
        if not self.catch_up(state):
            raise Aborted("GENERATION_GONE", f"generation {state.generation} is gone", session=state.session)

    def catch_up(self, state: SessionState) -> bool:
        """As refresh, to the end of the generation if it is gone; whether it lives."""
        folder = meta_folder(self._tenant, state.session)
        newer = self._store.list_keys(folder, start_after=meta_key(self._tenant, state.session, state.seq))
        for seq in meta_seqs(newer):
            record = self._read(state.session, seq) if seq == state.seq + 1 else None  # a gap: older ones were removed
            if not isinstance(record, Attributes | Checkpoint) or record.generation != state.generation:
                return False
            _apply(state, record)
        return True

    def confirm(self, state: SessionState) -> None:
        """After a put: it counts only if nothing newer supersedes its generation (Aborted).

        Unavailable if that cannot be told: the object is there, so nothing may claim that it is not.
        """
        try:
            self.refresh(state)
        except Aborted:
            raise
        except Exception as error:
            raise Unavailable("OUTCOME_UNKNOWN", "written, but it could not be confirmed") from error

    def _read(self, session: str, seq: int) -> Record:
        try:
            data = self._store.get(meta_key(self._tenant, session, seq))
        except KeyError:
            raise DataLoss("META_DAMAGED", f"meta record {seq} is missing", session=session, seq=seq) from None
        return read_record(data, self._tenant, session, seq)

    def _put(self, record: Record) -> bool:
        """Whether this very record is in place: the store may have written it and lost the answer."""
        key = meta_key(self._tenant, record.session, record.seq)
        if self._store.put_if_absent(key, [write_record(record)], urgent=isinstance(record, Delete | Expire)):
            return True
        return self._read(record.session, record.seq).writer == record.writer

    def _stamp(self, session: str, seq: int) -> dict[str, Any]:
        """The fields that every record has."""
        return {
            "tenant": self._tenant,
            "session": session,
            "seq": seq,
            "writer": secrets.token_hex(16),
            "created_unix_seconds": self._clock(),
        }


def _state_of(record: Create) -> SessionState:
    return SessionState(
        tenant=record.tenant,
        session=record.session,
        generation=generation_name(record.seq),
        seq=record.seq,
        spec=record.spec,
        shape=record.shape,
        ttl_seconds=record.ttl_seconds,
        pinned=record.pinned,
        created_unix_seconds=record.created_unix_seconds,
        ancestors=record.ancestors,
    )


def _apply(state: SessionState, change: Attributes | Checkpoint) -> None:
    state.seq, state.ttl_seconds, state.pinned = change.seq, change.ttl_seconds, change.pinned
    if isinstance(change, Checkpoint):
        state.adopt(change.merged, change.floor)


def _generation_of(record: Record) -> str:
    return generation_name(record.seq) if isinstance(record, Create) else record.generation


def _contended(session: str) -> Unavailable:
    return Unavailable("CONTENDED", f"{ATTEMPTS} other writers came first", session=session)
