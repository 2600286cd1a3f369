"""Fetch: rows as they are stored, or decoded, a piece at a time."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch

from kvstore_codecs.plan import Fit
from kvstore_codecs.projected import ProjectedRows
from kvstore_codecs.spec import KINDS, CodecSpec, Kind
from kvstore_kernels import DenseRows, SignRows
from kvstore_server.errors import FailedPrecondition, InvalidArgument
from kvstore_server.limits import Limits
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.scheduling.ahead import one_ahead
from kvstore_server.scheduling.completion import Later
from kvstore_server.scheduling.engine import Engine
from kvstore_server.sessions import attention
from kvstore_server.sessions.attention import Device
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.model import FetchAnswer, FetchPart, Precision
from kvstore_server.sessions.querying import check_layer
from kvstore_server.sessions.registry import Registry
from kvstore_server.storage.keys import check_name

PIECE_FRAMES = 2
"""Of vectors that are fetched: so many are decoded at a time, and as many before they are asked for."""
WHOLE = (0, 0)
"""The floor of a session that was not cut."""


@dataclass(frozen=True)
class FetchQuery:
    """Positions [start, end) of some layers (all, if none is named), as stored or decoded to `dtype`."""

    session: str
    generation: str | None
    layers: tuple[int, ...]
    start: int
    end: int
    decoded: bool
    dtype: torch.dtype | None
    precision: Precision


class Fetching:
    """Brings rows of one session; decodes on the device thread."""

    def __init__(self, registry: Registry, engine: Engine, device: Device, limits: Limits) -> None:
        self._registry, self._engine, self._device, self._limits = registry, engine, device, limits

    async def fetch(self, tenant: str, query: FetchQuery, deadline: float) -> FetchAnswer:
        """The rows of positions [start, end): what is stored, or vectors."""
        if query.start > query.end:
            raise InvalidArgument("token_start", f"{query.start} is beyond token_end {query.end}")
        check_name("session", query.session)
        live = await self._registry.open(tenant, query.session, query.generation, to_read=True)
        resident = await self._registry.load(live, query.end, deadline)
        layers = query.layers or tuple(range(resident.shape.layers))
        for layer in layers:
            check_layer(resident, layer)
            attention.effective(resident, layer, query.precision, live.state.floor)
        if not query.decoded and live.state.floor != WHOLE:
            raise FailedPrecondition("NO_LEVEL", "the session was cut to a level: fetch decoded vectors")
        size = (query.end - query.start) * resident.shape.raw_bytes_per_token * len(layers) // resident.shape.layers
        if size > self._limits.fetch_bytes_max:
            limit = self._limits.fetch_bytes_max
            raise InvalidArgument("token_end", f"{size} bytes are more than {limit} in one Fetch", limit=limit)
        fit = live.fit if query.decoded else _fit_of(live, resident, query)
        precision = attention.effective(resident, layers[0], replace(query.precision, required=False), live.state.floor)
        bases = None if query.decoded else fit
        parts = self._parts(tenant, resident, bases, replace(query, layers=layers, precision=precision), deadline)
        return FetchAnswer(live.info(), fit, parts)

    async def _parts(
        self, tenant: str, resident: ResidentSession, fit: Fit | None, query: FetchQuery, deadline: float
    ) -> AsyncGenerator[FetchPart]:
        cut = self._decoded if query.decoded else _stored
        if fit is not None and resident.plan is not None:
            for part in _bases(fit, resident.plan.spec, resident.shape.layers):
                yield part

        async def pieces() -> AsyncGenerator[list[FetchPart]]:
            for layer, kind, piece in product(query.layers, KINDS, self._pieces(resident, query)):
                yield await self._engine.run(partial(cut, resident, piece, layer, kind), deadline, "encode", tenant)

        async with aclosing(one_ahead(pieces())) as made:
            async for parts in made:
                for part in parts:
                    yield part

    def _pieces(self, resident: ResidentSession, query: FetchQuery) -> Iterator[FetchQuery]:
        """What is computed at a time: of vectors a few frames, so that queries slip in between and little is held."""
        token_bytes = resident.shape.kv_heads * resident.shape.head_dim * (query.dtype or resident.dtype).itemsize
        step = max(1, PIECE_FRAMES * self._limits.frame_bytes_max // token_bytes if query.decoded else query.end)
        for first in range(query.start, query.end, step):
            yield replace(query, start=first, end=min(first + step, query.end))

    def _decoded(self, resident: ResidentSession, query: FetchQuery, layer: int, kind: Kind) -> Later[list[FetchPart]]:
        blocks = attention.host_blocks(resident, layer, query.start, query.end, query.precision)
        fetch = attention.decoded(self._device, blocks, kind, query.dtype or resident.dtype)
        starts = [block.start for block in blocks]
        return Later(lambda: [FetchPart(layer, kind, "rows", *each) for each in zip(starts, fetch(), strict=True)])


def _fit_of(live: LiveSession, resident: ResidentSession, query: FetchQuery) -> Fit | None:
    """What reads the sketches that are asked for; the newest if there are none."""
    epochs = list(resident.sketched_ranges(query.start, query.end))
    if len(epochs) > 1:
        border = epochs[1][1]
        text = f"sketches from {border} on are of another fit than those before: fetch them apart"
        raise FailedPrecondition("SEVERAL_FITS", text, position=border)
    return live.fits[live.fit_entries[epochs[0][0]].start] if epochs and live.fit_entries else live.fit


def _bases(fit: Fit, spec: CodecSpec, layers: int) -> Iterator[FetchPart]:
    """Every basis of the fit: bits are shared out over all layers, so a reader of one needs all."""
    for kind in KINDS:
        if (basis := fit.basis_of(kind)) is not None:
            for row, layer in enumerate(spec.session_layers(kind, layers)):
                yield FetchPart(layer, kind, "basis", 0, basis.matrix[row])
                yield FetchPart(layer, kind, "weights", 0, basis.weights[row])


def _stored(resident: ResidentSession, query: FetchQuery, layer: int, kind: Kind) -> list[FetchPart]:
    if query.precision.keys_level or query.precision.values_level:
        raise FailedPrecondition("NO_LEVEL", "packed sketches are sent whole; a level is for decoded vectors")
    parts = []
    for block in attention.host_blocks(resident, layer, query.start, query.end, query.precision):
        rows = block.keys if kind == "keys" else block.values
        if isinstance(rows, SignRows):
            parts.append(FetchPart(layer, kind, "words", block.start, rows.signs.words))
            parts.append(FetchPart(layer, kind, "scales", block.start, rows.signs.scales))
        elif isinstance(rows, ProjectedRows):
            nothing = torch.empty(len(rows.coordinates), 0, dtype=torch.int32)
            parts.append(FetchPart(layer, kind, "words", block.start, nothing))
            parts.append(FetchPart(layer, kind, "scales", block.start, rows.coordinates))
        else:
            assert isinstance(rows, DenseRows)
            parts.append(FetchPart(layer, kind, "rows", block.start, rows.data))
    return parts
