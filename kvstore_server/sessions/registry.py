"""The sessions this process has open: found in the store, kept fresh, loaded within a memory budget."""

import asyncio
import weakref
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic

from kvstore_server.errors import Aborted, DeadlineExceeded, NotFound, OutOfRange
from kvstore_server.memory.growing import Allocate, pageable
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.loading import extend_resident, read_fit
from kvstore_server.sessions.projecting import Projecting
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.keys import is_generation
from kvstore_server.storage.session_state import AppendEntry, SessionState
from kvstore_server.storage.store import ObjectStore
from kvstore_server.telemetry import Telemetry

LOADS_AT_ONCE = 2
OPEN_MAX = 10_000


class Registry:
    """Opens sessions by name and loads their rows.

    What is found here was compared with the meta log at most `staleness_seconds` ago; 0 compares at every call.
    """

    def __init__(
        self,
        store: ObjectStore,
        projecting: Projecting,
        host_bytes_max: int,
        staleness_seconds: float,
        grace_seconds: float,
        allocate: Allocate = pageable,
        opened: Callable[[LiveSession], None] = lambda _: None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._store, self._projecting = store, projecting
        self._grace_seconds = grace_seconds
        self._allocate = allocate
        self._opened = opened
        self._telemetry = telemetry or Telemetry()
        self._host_bytes_max = host_bytes_max
        self._staleness_seconds = staleness_seconds
        self._open: dict[tuple[str, str], LiveSession] = {}
        self._loads = asyncio.Semaphore(LOADS_AT_ONCE)

    def log(self, tenant: str) -> CommitLog:
        return CommitLog(self._store, tenant)

    @property
    def resident_bytes(self) -> int:
        return sum(live.resident.nbytes for live in list(self._open.values()) if live.resident is not None)

    @property
    def resident_sessions(self) -> int:
        return sum(live.resident is not None for live in list(self._open.values()))

    async def find(self, tenant: str, name: str) -> LiveSession | None:
        """The living session of that name, fresh, or None."""
        live = self._open.get((tenant, name))
        if live is not None and monotonic() - live.checked_at >= self._staleness_seconds:
            live = live if await self._refreshed(tenant, live) else None
        if live is None:
            self.forget(tenant, name)
            return await self._from_store(tenant, name)
        await self.ensure_fit(live)  # another call may have found it and be about to read it
        return live

    async def open(self, tenant: str, name: str, generation: str | None, *, to_read: bool = False) -> LiveSession:
        """The living session; NotFound, or Aborted if it is not the generation that was named.

        `to_read`: or that generation, if it expired a short while ago.
        """
        live = await self.find(tenant, name)
        if generation and live is not None and generation > live.generation:
            live = await self._from_store(tenant, name)  # created again by another server, since the last look
        if generation and (live is None or generation != live.generation):
            live = await self._expired(tenant, name, generation) if to_read else None
        if generation and live is None:
            raise Aborted("GENERATION_GONE", f"generation {generation} of the session is gone", session=name)
        if live is None:
            raise NotFound("SESSION_NOT_FOUND", f"there is no session {name}", session=name)
        live.used_at = monotonic()
        return live

    async def open_now(self, tenant: str, name: str, generation: str | None) -> LiveSession:
        """As open, with everything that other servers have done until now."""
        live = await self.open(tenant, name, generation)
        try:
            await self.discover(live)
        except Aborted:
            self.forget(tenant, name)
            live = await self.open(tenant, name, generation)
        return live

    def forget(self, tenant: str, name: str) -> None:
        self._open.pop((tenant, name), None)

    def opened(self) -> list[LiveSession]:
        """Those that are open now."""
        return list(self._open.values())

    def doubt(self, tenant: str, name: str) -> None:
        """The next use of this session, if it is open, compares it with the store."""
        if live := self._open.get((tenant, name)):
            live.checked_at = -inf

    async def discover(self, live: LiveSession) -> None:
        """Takes in what other servers have appended."""
        await asyncio.to_thread(self.log(live.state.tenant).discover, live.state)
        await self.ensure_fit(live)

    async def load(self, live: LiveSession, end: int, deadline: float) -> ResidentSession:
        """The session's rows, at least up to `end`.

        Raises OutOfRange if the session is shorter, after one look at the store; DataLoss if an object is damaged.
        """
        if end > live.length:
            await self.discover(live)
        if end > live.length:
            raise OutOfRange("BEYOND_LENGTH", f"end {end} is beyond the length {live.length}", length=live.length)
        resident = live.resident
        if resident is None or resident.length < end:
            try:
                async with asyncio.timeout(max(0.0, deadline - monotonic())):
                    resident = await self._filled(live, end)
            except TimeoutError:
                raise DeadlineExceeded("DEADLINE", "the session was not loaded in time") from None
        return resident

    def loaded(
        self, tenant: str, name: str, generation: str | None, end: int
    ) -> tuple[LiveSession, ResidentSession] | None:
        """The session, if it is open, fresh, of that generation and loaded up to `end`: nothing to wait for."""
        live = self._open.get((tenant, name))
        now = monotonic()
        if live is None or now - live.checked_at >= self._staleness_seconds:
            return None
        resident = live.resident
        if (generation and generation != live.generation) or resident is None or resident.length < end:
            return None
        live.used_at = now
        return live, resident

    async def _filled(self, live: LiveSession, end: int) -> ResidentSession:
        async with live.growing:  # what was committed last may be on its way
            resident = live.resident
        if resident is None or resident.length < end:
            async with live.lock:
                resident = await self.fill(live, end)
        return resident

    async def fill(self, live: LiveSession, end: int) -> ResidentSession:
        """The session's rows, at least up to `end`; its lock must be held. What was read before damage is kept."""
        async with live.growing:
            pass
        await self.ensure_fits(live, live.fit_entries)
        resident = live.resident = await asyncio.to_thread(live.loadable)
        self._name_parent(live, resident)
        async with self._loads:
            with self._telemetry.load_seconds.time():
                await asyncio.to_thread(extend_resident, self.log(live.state.tenant), live.state, resident, end)
        self.make_room(live)
        return resident

    def _name_parent(self, live: LiveSession, resident: ResidentSession) -> None:
        """Tells a fork's rows whose pages they may share."""
        if live.state.ancestors and resident.parent is None:
            origin = live.state.ancestors[-1]
            parent = self._open.get((live.state.tenant, origin.session))
            if parent is None or parent.generation != origin.generation or parent.resident is None:
                return
            if all(cut <= known for cut, known in zip(parent.state.floor, live.state.floor, strict=True)):
                resident.parent, resident.shared_end = weakref.ref(parent.resident), origin.end

    async def ensure_fit(self, live: LiveSession) -> None:
        """Reads the session's newest fit if it is not known yet, and makes the plan, which may take seconds."""
        await self.ensure_fits(live, live.fit_entries[-1:])

    async def ensure_fits(self, live: LiveSession, made: Sequence[AppendEntry]) -> None:
        """As ensure_fit, of the fits that these appends made."""
        for entry in made:
            if entry.start not in live.fits:
                log = self.log(live.state.tenant)
                live.fits[entry.start] = await asyncio.to_thread(read_fit, log, live.state, entry)
                await asyncio.to_thread(lambda: live.plan)

    def make_room(self, keep: LiveSession) -> None:
        """Drops the rows of the least recently used sessions until the others fit; never those of `keep`."""
        loaded = [live for live in self._open.values() if live.resident is not None and live is not keep]
        over = self.resident_bytes - self._host_bytes_max
        for live in sorted(loaded, key=lambda each: each.used_at):
            if over <= 0 or live.is_busy or live.resident is None:
                continue
            over -= live.resident.nbytes
            live.resident = None
            self._telemetry.evictions.inc()

    async def _refreshed(self, tenant: str, live: LiveSession) -> bool:
        """Whether the generation still lives; its attributes are then up to date."""
        now = monotonic()
        superseded = await asyncio.to_thread(self.log(tenant).superseded, live.state)
        live.checked_at = now
        return not superseded

    async def _expired(self, tenant: str, name: str, generation: str) -> LiveSession | None:
        """Kept beside the living ones, under a name that no session can have."""
        kept = f"{name}@{generation}"
        live = self._open.get((tenant, kept))
        if live is not None and monotonic() - live.checked_at < self._staleness_seconds:
            return live
        now = monotonic()
        state = None
        if is_generation(generation):
            state = await asyncio.to_thread(self.log(tenant).expired, name, generation, self._grace_seconds)
        if state is None:
            self.forget(tenant, kept)
            return None
        if live is None:
            live = LiveSession(state, await self._projecting.of(state.spec, state.shape), self._allocate)
            await asyncio.to_thread(self.log(tenant).appends, state)
            await self.ensure_fit(live)
            self._keep(tenant, kept, live)
        live.checked_at = now
        return live

    def _keep(self, tenant: str, name: str, live: LiveSession) -> None:
        if len(self._open) >= OPEN_MAX:
            oldest = min(self._open.items(), key=lambda item: item[1].used_at)
            self.forget(*oldest[0])
        self._open[tenant, name] = live

    async def _from_store(self, tenant: str, name: str) -> LiveSession | None:
        now = monotonic()
        state = await asyncio.to_thread(self.log(tenant).load, name)
        return None if state is None else await self.adopt(state, now)

    async def adopt(self, state: SessionState, checked_at: float) -> LiveSession:
        """Opens what the store had at `checked_at`; its log is read unless it is known."""
        tenant, name = state.tenant, state.session
        live = LiveSession(state, await self._projecting.of(state.spec, state.shape), self._allocate)
        live.checked_at = checked_at
        live.used_at = monotonic()
        self._opened(live)
        await asyncio.to_thread(self.log(tenant).appends, state)
        await self.ensure_fit(live)
        # Another call may have opened it meanwhile: one of them must be the one that everybody extends.
        present = self._open.get((tenant, name))
        if present is not None and present.generation == live.generation:
            return present
        self._keep(tenant, name, live)
        return live
