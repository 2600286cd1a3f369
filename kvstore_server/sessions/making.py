"""What is stored of one append: its rows, a fit if it makes one, its object; ahead of its turn where they are known."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from kvstore_codecs.fit import fit_is_due
from kvstore_codecs.plan import CodecPlan, Fit
from kvstore_codecs.resolve import plan_for
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS
from kvstore_kernels import Backend
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.scheduling.engine import Engine
from kvstore_server.sessions.arrivals import Arrival, bounded
from kvstore_server.sessions.assembly import AppendAssembly
from kvstore_server.sessions.encoding import accept_sketch, encode_layer, make_layer_fit
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.segment import Segment
from kvstore_server.storage.store import Staged

T = TypeVar("T")
ENCODE_BYTES = 8 << 20
"""Raw bytes of the layers that are encoded in one piece of device work; queries slip in between pieces."""
LayerRows = tuple[KindRows, KindRows]


@dataclass(frozen=True)
class Made:
    """An append as it is stored; `staged`, its object, if that was written ahead."""

    rows: list[LayerRows]
    fit: Fit | None
    segment: Segment
    staged: Staged | None = None

    def is_next(self, live: LiveSession) -> bool:
        """Whether what was made ahead is what would be made now."""
        header, entries = self.segment.header, live.state.entries
        last = (entries[-1].start, entries[-1].digest) if entries else (None, "")
        return (header.previous, header.previous_digest) == last and header.epoch == live.epoch


class Maker:
    """Makes one append, whose frames are all there."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        backend: Backend,
        live: LiveSession,
        assembly: AppendAssembly,
        deadline: float,
    ) -> None:
        self._registry, self._engine, self._backend = registry, engine, backend
        self._live, self._assembly, self._deadline = live, assembly, deadline
        self._header = assembly.header

    async def ahead(self, log: CommitLog, digest: str, before: Arrival) -> Made | None:
        """While the append before it is under way, as if that made no fit; None if this one may make one.

        Its object is written and synced, under no name yet: that it may have only when it is the next.
        """
        live, header, plan = self._live, self._header, self._live.plan
        if plan is None or (header.encoding == "raw" and self._makes_fit()):
            return None
        if header.encoding == "sketch" and header.fit_fingerprint != plan.fingerprint:
            return None
        await bounded([before.received], header.start, self._deadline)
        if (before_digest := before.received.result()) is None:
            return None
        exact, epoch = exact_tokens(header.start, header.tokens, live.exact_end), live.epoch
        rows = await self._rows(plan, exact)
        after = before.start, before_digest

        def write() -> Made:
            segment = self._segment(log, after, digest, rows, None, epoch, exact)
            return Made(rows, None, segment, log.stage(segment))

        return await asyncio.to_thread(write)

    async def now(self, log: CommitLog, digest: str) -> Made:
        """At its turn: the session's lock must be held."""
        live, header, spec = self._live, self._header, self._live.state.spec
        plan, fit, exact = live.plan, None, exact_tokens(header.start, header.tokens, live.exact_end)
        if header.encoding == "raw" and self._makes_fit():
            fit = await self._fit(plan)
            first = max(spec.sink_tokens, header.start)
            exact = exact_tokens(header.start, header.tokens, first) if plan is None else 0
            plan = await asyncio.to_thread(plan_for, spec, live.state.shape, fit, live.projections)
        rows = await self._rows(plan, exact)
        epoch = live.epoch + (fit is not None and live.fitted)
        return Made(rows, fit, self._segment(log, None, digest, rows, fit, epoch, exact))

    def _makes_fit(self) -> bool:
        live, header = self._live, self._header
        return fit_is_due(live.state.spec, live.state.shape.layers, live.fit, header.start, header.tokens)

    async def _fit(self, plan: CodecPlan | None) -> Fit:
        live, header, shape = self._live, self._header, self._live.state.shape
        resident = await self._registry.fill(live, live.length) if plan is None else ResidentSession(shape)
        first = live.state.spec.sink_tokens if plan is None else header.start
        parts = [await self._on_device(partial(self._fit_layer, resident, first, n)) for n in range(shape.layers)]
        return Fit.of_layers(parts)

    def _fit_layer(self, resident: ResidentSession, first: int, layer: int) -> Fit:
        live, start = self._live, self._header.start
        return make_layer_fit(live.state.spec, resident, self._assembly, first, start, layer, live.projections)

    async def _rows(self, plan: CodecPlan | None, exact: int) -> list[LayerRows]:
        shape, rows = self._live.state.shape, list[LayerRows]()
        at_once = max(1, ENCODE_BYTES * shape.layers // self._header.data_bytes)
        for first in range(0, shape.layers, at_once):
            layers = range(first, min(first + at_once, shape.layers))
            rows += await self._on_device(lambda layers=layers: [self._layer(plan, layer, exact) for layer in layers])
        return rows

    def _layer(self, plan: CodecPlan | None, layer: int, exact: int) -> LayerRows:
        assembly, tokens = self._assembly, self._header.tokens
        shape = self._live.state.shape
        if self._header.encoding == "sketch" and plan is not None:
            keys, values = (accept_sketch(assembly, plan, shape, layer, kind, tokens, exact) for kind in KINDS)
        else:
            keys, values = (encode_layer(assembly, plan, layer, kind, exact, self._backend) for kind in KINDS)
        return keys, values

    def _segment(
        self,
        log: CommitLog,
        after: tuple[int, str] | None,
        digest: str,
        rows: list[LayerRows],
        fit: Fit | None,
        epoch: int,
        exact: int,
    ) -> Segment:
        header = self._header
        return log.segment(
            self._live.state,
            start=header.start,
            after=after,
            tokens=header.tokens,
            exact=exact,
            digest=digest,
            encoding=header.encoding,
            encoded_by="server" if header.encoding == "raw" else "client",
            keys=tuple(keys for keys, _ in rows),
            values=tuple(values for _, values in rows),
            fit=fit,
            epoch=epoch,
            block_hashes=header.block_hashes,
            block_tokens=header.block_tokens,
        )

    async def _on_device(self, work: Callable[[], T]) -> T:
        return await self._engine.run(work, self._deadline, "encode", self._live.state.tenant)


def exact_tokens(start: int, tokens: int, exact_end: int | None) -> int:
    """How many leading tokens of the append stay exact; all of them before the fit."""
    return tokens if exact_end is None else max(0, min(tokens, exact_end - start))
