"""One append from its header to its commit."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager
from time import monotonic
from typing import Any, TypeVar

from kvstore_kernels import Backend
from kvstore_server.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
)
from kvstore_server.limits import Limits
from kvstore_server.memory.growing import pageable
from kvstore_server.scheduling.engine import Engine
from kvstore_server.scheduling.pool import Pool
from kvstore_server.sessions.arrivals import Arrival
from kvstore_server.sessions.assembly import AppendAssembly, AppendHeader, Frame
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.making import LayerRows, Made, Maker, exact_tokens
from kvstore_server.sessions.model import AppendResult
from kvstore_server.sessions.quality import Pair, Quality
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.digest import append_digest
from kvstore_server.storage.keys import check_name
from kvstore_server.telemetry import Telemetry

T = TypeVar("T")
HASH_BYTES = 32
COPY_APART_BYTES = 256 << 10
"""From here on another thread copies a frame: shorter ones cost less than the switch."""


class Appending:
    """Admits, collects, encodes and commits appends. What is committed is shielded from the caller going away."""

    def __init__(
        self,
        registry: Registry,
        indexing: Indexing,
        quotas: Quotas,
        engine: Engine,
        backend: Backend,
        limits: Limits,
        telemetry: Telemetry,
        quality: Quality,
        room: Pool,
    ) -> None:
        self.registry, self.indexing, self.engine, self.backend = registry, indexing, engine, backend
        self.quotas = quotas
        self.limits = limits
        self.telemetry, self.quality = telemetry, quality
        self.commits: set[asyncio.Task[Any]] = set()
        self._room = room

    @asynccontextmanager
    async def begin(self, tenant: str, header: AppendHeader, deadline: float) -> AsyncIterator["OpenAppend"]:
        """Reserves the append's bytes and checks its header against the session, before the first frame is read."""
        check_name("header.session", header.session)
        self._check_header(header)
        share = self._room.share(tenant)
        share.take(header.data_bytes)
        with ExitStack() as left:
            left.callback(share.give, header.data_bytes)
            live = await self._checked(tenant, header)
            arrival = live.arrivals.enter(header.start, header.start + header.tokens)
            left.callback(live.arrivals.leave, arrival)
            opened = OpenAppend(self, live, header, arrival, deadline)
            try:
                yield opened
            finally:
                opened.then(left.pop_all().close)

    def keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Runs to its end even if the caller leaves."""
        task = asyncio.create_task(work)
        self.commits.add(task)
        task.add_done_callback(self.commits.discard)
        return task

    async def _checked(self, tenant: str, header: AppendHeader) -> LiveSession:
        live = await self.registry.open(tenant, header.session, header.generation)
        if header.start > live.length and not live.arrivals.reach(header.start):
            await self.registry.discover(live)
        if header.start > live.length and not live.arrivals.reach(header.start):
            text = f"start {header.start} is beyond the length {live.length}"
            raise OutOfRange("BEYOND_LENGTH", text, length=live.length)
        self.check_encoding(live, header)
        await self._check_quota(live, header)
        return live

    async def _check_quota(self, live: LiveSession, header: AppendHeader) -> None:
        """What is there already may be sent again: the answer may have been lost."""
        tenant = live.state.tenant
        refusal = self.quotas.append_refusal(tenant)
        if refusal is not None:
            await self.registry.discover(live)
            if header.start >= live.length:
                raise refusal
        self.quotas.received(tenant, header.data_bytes)

    def _check_header(self, header: AppendHeader) -> None:
        limits = self.limits
        for field, value, limit in (
            ("tokens", header.tokens, limits.append_tokens_max),
            ("bytes", header.data_bytes, limits.append_bytes_max),
            ("block_hashes", len(header.block_hashes), limits.append_block_hashes_max),
            ("start", header.start + header.tokens, limits.session_tokens_max),
        ):
            if value > limit:
                raise InvalidArgument(f"header.{field}", f"{value} is more than {limit}", limit=limit)
        if header.tokens < 1:
            raise InvalidArgument("header.tokens", "must be at least 1")
        if any(len(each) != HASH_BYTES for each in header.block_hashes):
            raise InvalidArgument("header.block_hashes", f"each must have {HASH_BYTES} bytes", limit=HASH_BYTES)
        size = header.block_tokens
        count = (header.start + header.tokens) // size - header.start // size if size else 0
        if len(header.block_hashes) != count:
            raise InvalidArgument("header.block_tokens", f"{count} blocks of {size} tokens end here", limit=count)

    @staticmethod
    def check_encoding(live: LiveSession, header: AppendHeader) -> None:
        if header.encoding == "raw":
            return
        if live.plan is None:
            raise FailedPrecondition("NOT_FITTED", "the session has no means yet: append vectors first")
        if header.fit_fingerprint != live.plan.fingerprint:
            raise FailedPrecondition(
                "FIT_DIFFERS", "fit_fingerprint is not the session's", fit_fingerprint=live.plan.fingerprint
            )


class OpenAppend:
    """An append whose frames are arriving."""

    def __init__(
        self, appending: Appending, live: LiveSession, header: AppendHeader, arrival: Arrival, deadline: float
    ) -> None:
        self._appending, self._live, self._header, self._deadline = appending, live, header, deadline
        self._arrival = arrival
        exact, paging = exact_tokens(header.start, header.tokens, live.exact_end), appending.backend.paging
        allocate = pageable if paging is None else paging.pinned
        self._assembly = AppendAssembly(header, live.state.shape, live.plan, exact, allocate)
        self._maker = Maker(appending.registry, appending.engine, appending.backend, live, self._assembly, deadline)
        self._copying: asyncio.Future[None] | None = None
        self.task: asyncio.Task[Any] | None = None
        """The commit, once it has begun; then what is left to do."""

    def then(self, last: Callable[[], None]) -> None:
        """Calls `last` when nothing is left to do, though the caller may have left."""
        if self.task is None or self.task.done():
            last()
        else:
            self.task.add_done_callback(lambda _: self.then(last))

    async def add(self, frame: Frame) -> None:
        """While one large frame is copied the next may arrive."""
        copy = self._assembly.add(frame)
        if len(frame.data) < COPY_APART_BYTES:
            copy()
            return
        await self._copied()
        self._copying = asyncio.get_running_loop().run_in_executor(None, copy)

    async def _copied(self) -> None:
        if self._copying is not None:
            await self._copying

    async def commit(self) -> AppendResult:
        """Encodes and commits; when it returns the append is durable.

        Once begun it runs to its end even if the caller leaves: then the outcome is unknown to the caller only.
        """
        await self._copied()
        self._assembly.check_complete()
        self.task = task = self._appending.keep(self._run())
        return await asyncio.shield(task)

    async def _run(self) -> AppendResult:
        header, live = self._header, self._live
        log = self._appending.registry.log(live.state.tenant)
        digest = await asyncio.to_thread(self._digest)
        self._arrival.received.set_result(digest)
        before = live.arrivals.before(header.start)
        made = await self._maker.ahead(log, digest, before) if before else None
        ahead = made and made.staged
        try:
            await live.arrivals.wait(header.start, self._deadline)
            async with live.lock:
                if made is None or not made.is_next(live):
                    present = await asyncio.to_thread(
                        log.already_present, live.state, header.start, header.tokens, digest
                    )
                    if present is not None:
                        return self._result(present)
                    await self._appending.registry.ensure_fit(live)
                    self._appending.check_encoding(live, header)  # one before this may have made another fit
                    made = await self._maker.now(log, digest)
                outcome = await self._commit(log, made)
                result = self._result(outcome)
                await self._tell(outcome)
                self._arrival.settle()  # what follows may be committed while these rows join the others
                self.task = self._appending.keep(self._grow(outcome, made.rows))
        finally:
            if ahead is not None:
                await asyncio.to_thread(ahead.discard)
        if header.data_bytes < COPY_APART_BYTES:
            await self.task
        return result

    def _digest(self) -> str:
        header, shape = self._header, self._live.state.shape.fingerprint
        return append_digest(shape, header.start, header.tokens, header.encoding, self._assembly.sent())

    async def _commit(self, log: CommitLog, made: Made) -> Committed | AlreadyPresent:
        live, header = self._live, self._header
        if monotonic() > self._deadline:
            raise DeadlineExceeded("DEADLINE", "the deadline passed before anything was written")

        def commit() -> Committed | AlreadyPresent:
            outcome = log.commit(live.state, made.segment, made.staged)
            if isinstance(outcome, Committed) and made.fit is not None:
                live.fits[header.start] = made.fit
            return outcome

        try:
            with self._appending.telemetry.commit_seconds.time():
                return await asyncio.to_thread(commit)
        except Aborted:
            self._appending.registry.forget(live.state.tenant, live.state.session)
            raise

    async def _tell(self, outcome: Committed | AlreadyPresent) -> None:
        live, appending = self._live, self._appending
        if isinstance(outcome, Committed):
            raw_bytes = self._header.tokens * live.state.shape.raw_bytes_per_token
            appending.telemetry.appended(live.state.spec, self._header.tokens, raw_bytes, outcome.entry.stored_bytes)
        await appending.registry.ensure_fit(live)
        entry = appending.indexing.changed(live)
        if isinstance(outcome, Committed):
            appending.quotas.stored(entry, outcome.entry.stored_bytes)

    async def _grow(self, outcome: Committed | AlreadyPresent, rows: list[LayerRows]) -> None:
        """The rows join those in memory, in the order of commits."""
        live, header, appending = self._live, self._header, self._appending

        def grow() -> Pair | None:
            live.grow(header.start, rows, header.tokens)
            if header.encoding == "raw":
                return appending.quality.copied(live, header.start, self._assembly.vectors)
            return None

        if isinstance(outcome, Committed):
            async with live.growing:
                appending.quality.keep(live, header.start, header.tokens, await asyncio.to_thread(grow))
            appending.registry.make_room(live)

    def _result(self, outcome: Committed | AlreadyPresent) -> AppendResult:
        entry, live = outcome.entry, self._live
        return AppendResult(
            generation=live.generation,
            length=live.length,
            already_present=isinstance(outcome, AlreadyPresent),
            digest=bytes.fromhex(entry.digest),
            stored_bytes=entry.stored_bytes,
        )
