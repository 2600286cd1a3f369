"""What this process holds of one session: its state in the store, its fits and, when loaded, its rows."""

import asyncio
from collections.abc import Sequence
from threading import Lock

from kvstore_codecs.artifact import Projection
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_server.memory.growing import Allocate, pageable
from kvstore_server.memory.resident import AppendRows, Epoch, ResidentSession
from kvstore_server.sessions.arrivals import Arrivals
from kvstore_server.sessions.model import SessionInfo
from kvstore_server.storage.segment import no_such_fit
from kvstore_server.storage.session_state import AppendEntry, SessionState


class LiveSession:
    """One generation of one session. Everything here is derived from the store and may be dropped at any time.

    `lock` is held while the session grows or is loaded, `growing` while rows that are durable join those in memory, in
    their order; queries hold none: they use the prefix that they name.
    """

    def __init__(
        self, state: SessionState, projections: tuple[Projection, ...] = (), allocate: Allocate = pageable
    ) -> None:
        self.state = state
        self.projections = projections
        self._allocate = allocate
        self.lock, self.growing = asyncio.Lock(), asyncio.Lock()
        self.arrivals = Arrivals()
        self.resident: ResidentSession | None = None
        self.fits: dict[int, Fit] = {}
        """By the position of the append that made each, as far as they were read."""
        self.checked_at = 0.0
        self.used_at = 0.0
        self.told_at = 0.0
        """The index knows of uses until then."""
        self.indexed_entries = 0
        """The index knows the token blocks of so many appends."""
        self._scanned, self._stored_bytes, self._scanned_merged = 0, 0, state.merged
        self._fit_entries: tuple[AppendEntry, ...] = ()
        self._scanning = Lock()

    @property
    def is_busy(self) -> bool:
        """Whether something grows or loads its rows."""
        return self.lock.locked() or self.growing.locked()

    @property
    def generation(self) -> str:
        return self.state.generation

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def fit_entries(self) -> Sequence[AppendEntry]:
        """The appends that made a fit, each the first of an epoch; a fork has those of which it shares any tokens."""
        self._scan()
        return self._fit_entries

    @property
    def fit(self) -> Fit | None:
        """The newest that was read."""
        return next((self.fits[each.start] for each in reversed(self.fit_entries) if each.start in self.fits), None)

    @property
    def stored_bytes(self) -> int:
        """Of the session's own appends; what a fork shares is its parent's."""
        self._scan()
        return self._stored_bytes

    def _scan(self) -> None:
        """Looks at entries that came since the last time, at all after some were merged: there may be very many."""
        with self._scanning:  # several threads ask
            entries = self.state.entries or []
            if self._scanned_merged != self.state.merged:
                self._scanned, self._stored_bytes, self._scanned_merged = 0, 0, self.state.merged
            new = entries[self._scanned :]
            known = self._fit_entries if self._scanned else ()
            self._fit_entries = (*known, *(entry for entry in new if entry.fit_range is not None))
            own = self.state.session, self.state.generation
            self._stored_bytes += sum(each.stored_bytes for each in new if (each.session, each.generation) == own)
            self._scanned += len(new)

    @property
    def fitted(self) -> bool:
        return not self.state.spec.needs_fit or bool(self.fit_entries)

    @property
    def exact_end(self) -> int | None:
        """Positions below it are exact; None while all are."""
        if not self.fitted:
            return None
        made = self.fit_entries
        return max(self.state.spec.sink_tokens, made[0].start if made else 0)

    @property
    def epoch(self) -> int:
        """The number of the newest, which the next append is of unless it makes a fit.

        DataLoss if an append is of one whose fit is not there.
        """
        newest, entries = max(0, len(self.fit_entries) - 1), self.state.entries or []
        if entries and not entries[-1].damage and entries[-1].epoch != newest:
            raise no_such_fit(entries[-1].identity(self.state.tenant), entries[-1].end, entries[-1].epoch)
        return newest

    @property
    def plan(self) -> CodecPlan | None:
        """The newest epoch's; None before the fit, for codecs that need one. The fit must have been read."""
        if not self.fitted:
            return None
        return plan_for(self.state.spec, self.state.shape, self.fit, self.projections)

    def loadable(self) -> ResidentSession:
        """The session's rows, as far as they are loaded, ready to take more."""
        resident = self.resident or ResidentSession(self.state.shape, self._allocate)
        resident.max_positions = {each.sha256: each.header.max_position for each in self.projections}
        if self.fitted and len(resident.epochs) < max(1, len(self.fit_entries)):
            resident.adopt(self.epochs(resident.epochs))
        return resident

    def epochs(self, known: Sequence[Epoch] = ()) -> list[Epoch]:
        """Those that are `known` and all after them; none before the fit. The fits must have been read.

        To make a plan that is not kept may take seconds.
        """
        state, made = self.state, self.fit_entries
        if self.exact_end is None:
            return []
        starts = [self.exact_end, *(entry.start for entry in made[1:])]
        fits = [self.fits[entry.start] for entry in made] or [None]
        new = list(zip(starts, fits, strict=True))[len(known) :]
        return [*known, *(Epoch(at, plan_for(state.spec, state.shape, fit, self.projections)) for at, fit in new)]

    def grow(self, start: int, rows: AppendRows, tokens: int) -> None:
        """Adds an append that was just committed, if all rows before it are loaded."""
        if start == (self.resident.length if self.resident else 0):
            self.resident = self.loadable()
            self.resident.extend(start, rows, tokens)

    def info(self) -> SessionInfo:
        """The session as it is known now. The fit must have been read."""
        state, plan = self.state, self.plan
        forked = state.ancestors[-1] if state.ancestors else None
        return SessionInfo(
            name=state.session,
            generation=state.generation,
            length=state.length,
            shape=state.shape,
            spec=state.spec,
            fitted=self.fitted,
            exact_end=state.length if self.exact_end is None else self.exact_end,
            fit_fingerprint="" if plan is None else plan.fingerprint,
            ttl_seconds=state.ttl_seconds,
            pinned=state.pinned,
            created_unix_seconds=state.created_unix_seconds,
            stored_bytes=self.stored_bytes,
            forked_from=forked.session if forked else None,
            forked_at=forked.end if forked else None,
            affinity=state.ancestors[0].session if forked else state.session,
            max_position=min((each.header.max_position for each in self.projections), default=None),
        )
