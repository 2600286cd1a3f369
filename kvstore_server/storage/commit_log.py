"""Sessions as two logs of put-if-absent objects: the one place that decides what is committed.

A put is a commit only if, after it, the meta log shows nothing newer that ends the generation, and no checkpoint that
has the position: then the appends that were merged decide. What is read under a log name counts by the same rule. The
rest follows from names: `start` must equal the length, so every position has one winner, without a leader, a lease or a
recovery.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_server.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    KVStoreError,
    Unavailable,
)
from kvstore_server.storage.checksums import whole_damage
from kvstore_server.storage.container import DamagedError
from kvstore_server.storage.keys import log_key, ref_key
from kvstore_server.storage.log_reader import read_entry
from kvstore_server.storage.log_view import LogView, serialised, unknown_length
from kvstore_server.storage.meta import ANCESTORS_MAX
from kvstore_server.storage.segment import Segment, data_loss, geometry_of, write_segment
from kvstore_server.storage.segment_header import Encoder, Encoding, SegmentHeader
from kvstore_server.storage.session_state import AppendEntry, SessionState, entry_of, follows, range_at
from kvstore_server.storage.store import NotStaged, Staged


@dataclass(frozen=True)
class Committed:
    """This call's object is durable and everyone's next position is after it."""

    entry: AppendEntry


@dataclass(frozen=True)
class AlreadyPresent:
    """The same append was committed before."""

    entry: AppendEntry


class CommitLog(LogView):
    """The sessions of one tenant, to be written too."""

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

    @serialised
    def update(self, state: SessionState, *, ttl_seconds: float | None, pinned: bool) -> None:
        """Sets both attributes."""
        self._meta.update(state, ttl_seconds=ttl_seconds, pinned=pinned)

    def delete(self, session: str, generation: str | None = None) -> str | None:
        """Ends the living generation (only that one, if it is named); its name, None if there is nothing to delete."""
        return self._meta.delete(session, generation)

    def expire(self, session: str, generation: str, is_due: Callable[[SessionState], bool]) -> str | None:
        """As delete of a generation that nobody uses, if `is_due` still says so of its newest attributes."""
        return self._meta.expire(session, generation, is_due)

    @serialised
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
            state.share(source.floor)
        return state, present

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
        epoch: int = 0,
        block_hashes: tuple[bytes, ...] = (),
        block_tokens: int = 0,
        start: int | None = None,
        after: tuple[int, str] | None = None,
    ) -> Segment:
        """The next append of `state`, not committed. `fit` only if this append made it; `epoch` is its own's number.

        `start` is where the caller believes that the session ends: commit refuses the segment if it no longer does.
        `after` are start and digest of the append that it follows, where that is still to be committed.
        """
        if tokens < 1:
            raise ValueError("an append has at least one token")
        previous, previous_digest = self._end(state) if after is None else after
        identity = self._next(state)
        header = SegmentHeader(
            identity=identity if start is None else replace(identity, start=start),
            geometry=geometry_of(tokens, exact, state.shape.dtype, keys, values, fit),
            previous=previous,
            previous_digest=previous_digest,
            digest=digest,
            encoding=encoding,
            encoded_by=encoded_by,
            codec_fingerprint=state.spec.fingerprint,
            shape_fingerprint=state.shape.fingerprint,
            fit_range=(fit.token_start, fit.token_end) if fit else None,
            epoch=epoch,
            block_hashes=block_hashes,
            block_tokens=block_tokens,
            created_unix_seconds=self._clock(),
        )
        return Segment(header, keys, values, fit)

    @serialised
    def _end(self, state: SessionState) -> tuple[int | None, str]:
        last = self._last(state)
        return (last.start, last.digest) if last else (None, "")

    def stage(self, segment: Segment) -> Staged:
        """Writes the segment's object ahead of its commit, which may come or not."""
        return self._store.stage(write_segment(segment))

    @serialised
    def already_present(self, state: SessionState, start: int, tokens: int, digest: str) -> AlreadyPresent | None:
        """None if `start` is the length. Looks at the store only if it is not.

        Below it, the same append again is AlreadyPresent and another one raises AlreadyExists; beyond it, OutOfRange
        names the length.
        """
        self._reach(state, start)
        if start == state.length:
            return None
        self._meta.refresh(state)
        return self._compare(state, state.at(start), start, tokens, digest)

    @serialised
    def commit(self, state: SessionState, segment: Segment, staged: Staged | None = None) -> Committed | AlreadyPresent:
        """Makes the append durable, in a constant number of store calls; see already_present for what else may come.

        `staged` is the segment's, if it was written ahead.
        Unavailable: the outcome is unknown, and the same call again settles it.
        """
        header = segment.header
        present = self.already_present(state, header.start, header.tokens, header.digest)
        if present is not None:
            return present
        staged = staged or NotStaged(self._store, write_segment(segment))
        key = log_key(self._tenant, state.session, state.generation, header.start)
        entry = entry_of(key, header, staged.size)
        if header.identity != self._next(state) or not follows(entry, self._last(state)):
            raise ValueError("the segment was not made as the next of this state")
        won = staged.put_if_absent(key)
        found = entry if won else self._winner(state)
        self._meta.confirm(state)
        if range_at(state.merged, header.start):  # the name was free, if it was, only because its append is elsewhere
            self.discover(state)
            return self._compare(state, state.at(header.start), header.start, header.tokens, header.digest)
        if isinstance(found, KVStoreError):
            raise found
        self._extend(state, found)
        return Committed(found) if won else self._compare(state, found, header.start, header.tokens, header.digest)

    def _winner(self, state: SessionState) -> AppendEntry | KVStoreError:
        """The append that took the next position before us, or why that is not known."""
        identity = self._next(state)
        try:
            return read_entry(self._store, identity)
        except KeyError:
            return Unavailable("OUTCOME_UNKNOWN", "the object that was in the way is gone")
        except DamagedError as error:
            return data_loss(identity, unknown_length(identity, str(error)))

    def _compare(
        self, state: SessionState, entry: AppendEntry | None, start: int, tokens: int, digest: str
    ) -> AlreadyPresent:
        if entry is not None and entry.damage:
            raise data_loss(entry.identity(self._tenant), whole_damage(entry.start, entry.end, entry.damage))
        if entry and (entry.start, entry.tokens, entry.end, entry.digest) == (start, tokens, start + tokens, digest):
            return AlreadyPresent(entry)
        text = f"another append holds position {start}; the length is {state.length}"
        found = entry.digest if entry is not None and entry.start == start else ""
        raise AlreadyExists("POSITION_TAKEN", text, length=state.length, digest=found)
