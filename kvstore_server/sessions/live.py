"""What this process holds of one session: its state in the store, its fit and, when loaded, its rows."""

import asyncio

from kvstore_codecs.artifact import Projection
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_server.memory.growing import Allocate, pageable
from kvstore_server.memory.resident import AppendRows, ResidentSession
from kvstore_server.sessions.arrivals import Arrivals
from kvstore_server.sessions.model import SessionInfo
from kvstore_server.storage.session_state import AppendEntry, SessionState


class LiveSession:
    """One generation of one session. Everything here is derived from the store and may be dropped at any time.

    `lock` is held while the session grows or is loaded; queries hold none: they use the prefix that they name.
    """

    def __init__(
        self, state: SessionState, projections: tuple[Projection, ...] = (), allocate: Allocate = pageable
    ) -> None:
        self.state = state
        self.projections = projections
        self._allocate = allocate
        self.lock = asyncio.Lock()
        self.arrivals = Arrivals()
        self.resident: ResidentSession | None = None
        self.fit: Fit | None = None
        self.checked_at = 0.0
        self.used_at = 0.0
        self.told_at = 0.0
        """The index knows of uses until then."""
        self.indexed_entries = 0
        """The index knows the token blocks of so many appends."""
        self._scanned, self._stored_bytes, self._scanned_merged = 0, 0, state.merged
        self._fit_entry: AppendEntry | None = None

    @property
    def generation(self) -> str:
        return self.state.generation

    @property
    def length(self) -> int:
        return self.state.length

    @property
    def fit_entry(self) -> AppendEntry | None:
        """The append that made the fit; a fork has it if it shares any of that append's tokens."""
        self._scan()
        return self._fit_entry

    @property
    def stored_bytes(self) -> int:
        """Of the session's own appends; what a fork shares is its parent's."""
        self._scan()
        return self._stored_bytes

    def _scan(self) -> None:
        """Looks at entries that came since the last time, at all after some were merged: there may be very many."""
        entries = self.state.entries or []
        if self._scanned_merged != self.state.merged:
            self._scanned, self._stored_bytes, self._scanned_merged = 0, 0, self.state.merged
        for entry in entries[self._scanned :]:
            if self._fit_entry is None and entry.fit_range is not None:
                self._fit_entry = entry
            if (entry.session, entry.generation) == (self.state.session, self.state.generation):
                self._stored_bytes += entry.stored_bytes
        self._scanned = len(entries)

    @property
    def fitted(self) -> bool:
        return not self.state.spec.needs_fit or self.fit_entry is not None

    @property
    def exact_end(self) -> int | None:
        """Positions below it are exact; None while all are."""
        if not self.fitted:
            return None
        made = self.fit_entry
        return max(self.state.spec.sink_tokens, made.start if made else 0)

    @property
    def plan(self) -> CodecPlan | None:
        """None before the fit, for codecs that need one. The fit must have been read."""
        if not self.fitted:
            return None
        return plan_for(self.state.spec, self.state.shape, self.fit, self.projections)

    def loadable(self) -> ResidentSession:
        """The session's rows, as far as they are loaded, ready to take more."""
        resident = self.resident or ResidentSession(self.state.shape, self._allocate)
        if (plan := self.plan) is not None and self.exact_end is not None:
            resident.adopt(plan, self.exact_end)
        return resident

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
