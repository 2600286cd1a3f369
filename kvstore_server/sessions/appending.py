"""One append from its header to its commit."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from time import monotonic
from typing import TypeVar

from kvstore_codecs.fit import fit_is_due
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS
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
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.scheduling.engine import Engine
from kvstore_server.scheduling.pool import Pool
from kvstore_server.sessions.assembly import AppendAssembly, AppendHeader, Frame
from kvstore_server.sessions.encoding import accept_sketch, encode_layer, make_layer_fit
from kvstore_server.sessions.indexing import Indexing
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.model import AppendResult
from kvstore_server.sessions.quality import Pair, Quality
from kvstore_server.sessions.quotas import Quotas
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.digest import append_digest
from kvstore_server.storage.keys import check_name
from kvstore_server.telemetry import Telemetry

HASH_BYTES = 32
T = TypeVar("T")
ENCODE_BYTES = 8 << 20
"""Raw bytes of the layers that are encoded in one piece of device work; queries slip in between pieces."""
COPY_APART_BYTES = 256 << 10
"""From here on another thread copies a frame: shorter ones cost less than the switch."""
LayerRows = tuple[KindRows, KindRows]


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
        self.commits: set[asyncio.Task[AppendResult]] = set()
        self._room = room

    @asynccontextmanager
    async def begin(self, tenant: str, header: AppendHeader, deadline: float) -> AsyncIterator["OpenAppend"]:
        """Reserves the append's bytes and checks its header against the session, before the first frame is read."""
        check_name("header.session", header.session)
        self._check_header(header)
        share, opened = self._room.share(tenant), None
        share.take(header.data_bytes)
        try:
            live = await self._checked(tenant, header)
            with live.arrivals.until(header.start + header.tokens):
                opened = OpenAppend(self, live, header, deadline)
                yield opened
        finally:
            if opened is None or opened.task is None or opened.task.done():
                share.give(header.data_bytes)
            else:  # its caller has left
                opened.task.add_done_callback(lambda _: share.give(header.data_bytes))

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

    def __init__(self, appending: Appending, live: LiveSession, header: AppendHeader, deadline: float) -> None:
        self._appending, self._live, self._header, self._deadline = appending, live, header, deadline
        exact, paging = _exact_tokens(header, live.exact_end), appending.backend.paging
        allocate = pageable if paging is None else paging.pinned
        self._assembly = AppendAssembly(header, live.state.shape, live.plan, exact, allocate)
        self._copying: asyncio.Future[None] | None = None
        self._kept: Pair | None = None
        self.task: asyncio.Task[AppendResult] | None = None
        """The commit, once it has begun."""

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
        self.task = task = asyncio.create_task(self._run())
        self._appending.commits.add(task)
        task.add_done_callback(self._appending.commits.discard)
        return await asyncio.shield(task)

    async def _run(self) -> AppendResult:
        header, live = self._header, self._live
        log = self._appending.registry.log(live.state.tenant)
        digest = await asyncio.to_thread(self._digest)
        await live.arrivals.wait(header.start, self._deadline)
        async with live.lock:
            present = await asyncio.to_thread(log.already_present, live.state, header.start, header.tokens, digest)
            if present is not None:
                return self._result(present)
            await self._appending.registry.ensure_fit(live)
            self._appending.check_encoding(live, header)  # an append before this one may have made another fit
            rows, fit, exact = await self._encoded()
            return await self._commit(log, digest, rows, fit, exact)

    def _digest(self) -> str:
        header, shape = self._header, self._live.state.shape.fingerprint
        return append_digest(shape, header.start, header.tokens, header.encoding, self._assembly.sent())

    async def _encoded(self) -> tuple[list[LayerRows], Fit | None, int]:
        """What is stored of each layer, the fit if this append makes it, and how many of its tokens stay exact."""
        header, live, appending = self._header, self._live, self._appending
        shape, spec = live.state.shape, live.state.spec
        plan, exact, fit = live.plan, _exact_tokens(header, live.exact_end), None
        if header.encoding == "raw" and fit_is_due(spec, shape.layers, live.fit, header.start, header.tokens):
            resident = await appending.registry.fill(live, live.length) if plan is None else ResidentSession(shape)
            first = spec.sink_tokens if plan is None else header.start
            parts = [await self._on_device(partial(self._fit_layer, resident, first, n)) for n in range(shape.layers)]
            fit = Fit.of_layers(parts)
            exact = _exact_tokens(header, max(spec.sink_tokens, header.start)) if plan is None else 0
            plan = await asyncio.to_thread(plan_for, spec, shape, fit, live.projections)
        rows: list[LayerRows] = []
        at_once = max(1, ENCODE_BYTES * shape.layers // header.data_bytes)
        for first in range(0, shape.layers, at_once):
            layers = range(first, min(first + at_once, shape.layers))
            rows += await self._on_device(lambda layers=layers: [self._layer(plan, layer, exact) for layer in layers])
        return rows, fit, exact

    def _fit_layer(self, resident: ResidentSession, first: int, layer: int) -> Fit:
        live, start = self._live, self._header.start
        return make_layer_fit(live.state.spec, resident, self._assembly, first, start, layer, live.projections)

    def _layer(self, plan: CodecPlan | None, layer: int, exact: int) -> LayerRows:
        assembly, tokens = self._assembly, self._header.tokens
        shape, backend = self._live.state.shape, self._appending.backend
        if self._header.encoding == "sketch" and plan is not None:
            keys, values = (accept_sketch(assembly, plan, shape, layer, kind, tokens, exact) for kind in KINDS)
        else:
            keys, values = (encode_layer(assembly, plan, layer, kind, exact, backend) for kind in KINDS)
        return keys, values

    async def _on_device(self, work: Callable[[], T]) -> T:
        return await self._appending.engine.run(work, self._deadline, "encode", self._live.state.tenant)

    async def _commit(
        self, log: CommitLog, digest: str, rows: list[LayerRows], fit: Fit | None, exact: int
    ) -> AppendResult:
        live, header = self._live, self._header
        if monotonic() > self._deadline:
            raise DeadlineExceeded("DEADLINE", "the deadline passed before anything was written")
        segment = log.segment(
            live.state,
            start=header.start,
            tokens=header.tokens,
            exact=exact,
            digest=digest,
            encoding=header.encoding,
            encoded_by="server" if header.encoding == "raw" else "client",
            keys=tuple(keys for keys, _ in rows),
            values=tuple(values for _, values in rows),
            fit=fit,
            epoch=live.epoch + (fit is not None and live.fitted),
            block_hashes=header.block_hashes,
            block_tokens=header.block_tokens,
        )

        def commit() -> Committed | AlreadyPresent:
            outcome = log.commit(live.state, segment)
            if isinstance(outcome, Committed):
                if fit is not None:
                    live.fits[header.start] = fit
                live.grow(header.start, rows, header.tokens)
                self._copy()
            return outcome

        try:
            with self._appending.telemetry.commit_seconds.time():
                outcome = await asyncio.to_thread(commit)
        except Aborted:
            self._appending.registry.forget(live.state.tenant, live.state.session)
            raise
        if isinstance(outcome, Committed):
            self._appending.quotas.stored(live.state.tenant, outcome.entry.stored_bytes)
            self._observe(outcome.entry.stored_bytes)
        self._appending.registry.make_room(live)
        await self._appending.registry.ensure_fit(live)
        self._appending.indexing.changed(live)
        return self._result(outcome)

    def _observe(self, stored_bytes: int) -> None:
        header, state, appending = self._header, self._live.state, self._appending
        raw_bytes = header.tokens * state.shape.raw_bytes_per_token
        appending.telemetry.appended(state.spec, header.tokens, raw_bytes, stored_bytes)
        appending.quality.keep(self._live, header.start, header.tokens, self._kept)

    def _copy(self) -> None:
        if self._header.encoding == "raw":
            self._kept = self._appending.quality.copied(self._live, self._header.start, self._assembly.vectors)

    def _result(self, outcome: Committed | AlreadyPresent) -> AppendResult:
        entry, live = outcome.entry, self._live
        return AppendResult(
            generation=live.generation,
            length=live.length,
            already_present=isinstance(outcome, AlreadyPresent),
            digest=bytes.fromhex(entry.digest),
            stored_bytes=entry.stored_bytes,
        )


def _exact_tokens(header: AppendHeader, exact_end: int | None) -> int:
    """How many leading tokens of the append stay exact; all of them before the fit."""
    if exact_end is None:
        return header.tokens
    return max(0, min(header.tokens, exact_end - header.start))
