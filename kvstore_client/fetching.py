"""Stored rows brought here: decoded to vectors, or packed as they are."""

import asyncio
from collections import deque
from collections.abc import AsyncIterable, Callable, Sequence

import torch
from torch import Tensor

from kvstore_client.answers import FINEST, Precision, Sketches
from kvstore_client.arriving import Rows
from kvstore_client.errors import Internal, invalid
from kvstore_client.info import SessionInfo
from kvstore_client.link import Link
from kvstore_client.rpcs import FETCH, GET_PROJECTION
from kvstore_client.tensors import FROM_PROTO, TO_PROTO, from_proto
from kvstore_client.wire import Part
from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind
from kvstore_codecs.transform import Basis
from kvstore_kernels.types import Signs, as_torch_dtype
from kvstore_proto.v1 import kvstore_pb2 as pb

KIND_NAMES: dict[int, Kind] = {pb.KIND_KEYS: "keys", pb.KIND_VALUES: "values"}
COPY_APART_BYTES = 256 << 10
"""From here on another thread copies a part: shorter ones cost less than the switch."""
COPIES_MAX = 4
"""At a time: to write memory for the first time takes one thread longer than the part needs to come."""


async def fetch_vectors(
    link: Link,
    info: SessionInfo,
    *,
    layers: Sequence[int],
    start: int,
    end: int,
    dtype: torch.dtype | None = None,
    precision: Precision = FINEST,
    timeout: float,
) -> tuple[Tensor, Tensor]:
    """Keys and values [layers, end - start, kv_heads, d] in `dtype`, or the session's own."""
    dtype = dtype or as_torch_dtype(info.shape.dtype)
    if dtype not in TO_PROTO:
        raise invalid("dtype", f"{dtype} is not one of float32, float16, bfloat16")
    request = _request(info, layers, start, end)
    request.decoded, request.dtype = True, TO_PROTO[dtype]
    request.precision.CopyFrom(precision.to_proto())
    size = (len(layers), end - start, info.shape.kv_heads, info.shape.head_dim)

    async def collect(replies: AsyncIterable[pb.FetchHeader | Part]) -> tuple[Tensor, Tensor]:
        found, both = _Found(info, start, end), (torch.empty(size, dtype=dtype), torch.empty(size, dtype=dtype))
        for kind, whole in zip(KINDS, both, strict=True):
            for layer, own in zip(layers, whole, strict=True):
                found.rows[layer, kind, pb.PART_ROWS] = Rows(start, own, len(own))
        await _collect(replies, found)
        if missing := [key for key, rows in found.rows.items() if rows.count != end - start]:
            raise Internal(f"of {missing[0]} {found.rows[missing[0]].count} rows came, not {end - start}")
        return both

    return await link.download(FETCH, request, collect, timeout=timeout, affinity=info.affinity)


async def fetch_sketches(
    link: Link, info: SessionInfo, *, layers: Sequence[int], start: int, end: int, timeout: float
) -> Sketches:
    """What is stored of positions [start, end), with the fit that reads it."""
    request = _request(info, layers, start, end)

    async def collect(replies: AsyncIterable[pb.FetchHeader | Part]) -> Sketches:
        found = await _collect(replies, _Found(info, start, end))
        parts: dict[tuple[int, Kind], KindRows] = {
            (layer, kind): found.sketch(layer, kind) for layer in layers for kind in KINDS
        }
        return Sketches(start, end, found.header.session.exact_end, _fit_of(found), parts)

    return await link.download(FETCH, request, collect, timeout=timeout, affinity=info.affinity)


async def fetch_projection(link: Link, sha256: str, timeout: float) -> bytes:
    """The file of a projection."""

    async def collect(replies: AsyncIterable[pb.GetProjectionResponse]) -> bytes:
        return b"".join([reply.data async for reply in replies])

    return await link.download(GET_PROJECTION, pb.GetProjectionRequest(sha256=sha256), collect, timeout=timeout)


def _request(info: SessionInfo, layers: Sequence[int], start: int, end: int) -> pb.FetchRequest:
    return pb.FetchRequest(
        session=info.name, generation=info.generation, layers=layers, token_start=start, token_end=end
    )


def _fit_of(found: "_Found") -> Fit | None:
    header = found.header
    if not header.HasField("mean_keys"):
        return None
    return Fit(
        mean_keys=from_proto(header.mean_keys, dtype=torch.float32),
        mean_values=from_proto(header.mean_values, dtype=torch.float32),
        token_start=header.fit_token_start,
        token_end=header.fit_token_end,
        basis_keys=found.basis("keys"),
        basis_values=found.basis("values"),
    )


class _Found:
    """What one Fetch of [start, end) brought: the rows of each (layer, kind, part)."""

    def __init__(self, info: SessionInfo, start: int, end: int) -> None:
        self.header = pb.FetchHeader()
        self.rows: dict[tuple[int, Kind, int], Rows] = {}
        self._info, self._start, self._end = info, start, end

    def take(self, part: Part) -> Callable[[], None]:
        """Gives a part its place; what it returns brings it there. Internal if it has none."""
        head, tensor = part.head, part.tensor
        dtype, shape = FROM_PROTO.get(tensor.dtype), tuple(tensor.shape)
        if dtype is None or not shape:
            raise Internal(f"the server sent a tensor of dtype {tensor.dtype} and shape {list(shape)}")
        key = head.layer, KIND_NAMES[head.kind], head.part
        if key not in self.rows:
            room, most = self._room(head, shape[0])
            self.rows[key] = Rows(head.token_start, torch.empty((room, *shape[1:]), dtype=dtype), most)
        return self.rows[key].place(head.token_start, shape, dtype, part.data)

    def _room(self, head: pb.FetchPart, count: int) -> tuple[int, int]:
        """For how many rows of a part there is to be room, of which `count` come first, and how many it may have."""
        if head.part in (pb.PART_BASIS, pb.PART_WEIGHTS):
            return (heads := self._info.shape.kv_heads), heads
        most = max(0, self._end - head.token_start)
        exact = self.header.session.exact_end - head.token_start
        return exact if head.part == pb.PART_ROWS and count <= exact < most else most, most

    def sketch(self, layer: int, kind: Kind) -> KindRows:
        shape = self._info.shape
        rows = self.joined(layer, kind, pb.PART_ROWS, self._start)
        if rows is None:
            rows = torch.empty((0, shape.kv_heads, shape.head_dim), dtype=as_torch_dtype(shape.dtype))
        border, tokens = self._start + rows.shape[0], self._end - self._start
        words = self.joined(layer, kind, pb.PART_WORDS, border)
        scales = self.joined(layer, kind, pb.PART_SCALES, border)
        signs = None if words is None or scales is None else Signs(words, scales)
        sketched = 0 if signs is None else signs.words.shape[0]
        if border + sketched != self._end or (signs is not None and signs.scales.shape[0] != sketched):
            raise Internal(
                f"layer {layer} {kind}: {rows.shape[0]} rows and {sketched} sketches came for {tokens} tokens"
            )
        return KindRows(rows, signs)

    def basis(self, kind: Kind) -> Basis | None:
        """The bases that came, in order of their layers."""
        layers = sorted(layer for layer, of_kind, part in self.rows if of_kind == kind and part == pb.PART_BASIS)
        parts = [[self.joined(layer, kind, part, 0) for layer in layers] for part in (pb.PART_BASIS, pb.PART_WEIGHTS)]
        matrix, weights = ([tensor for tensor in each if tensor is not None] for each in parts)
        if not len(matrix) == len(weights) == len(layers):
            raise Internal(f"{kind}: bases came without weights")
        return Basis(torch.stack(matrix), torch.stack(weights)) if layers else None

    def joined(self, layer: int, kind: Kind, part: int, start: int) -> Tensor | None:
        """One part's rows; None if none came. Internal if they do not begin at `start`."""
        rows = self.rows.get((layer, kind, part))
        if rows is not None and rows.first != start:
            raise Internal(f"layer {layer} {kind}: a part starts at {rows.first}, not {start}")
        return None if rows is None else rows.tensor()


async def _collect(replies: AsyncIterable[pb.FetchHeader | Part], found: _Found) -> _Found:
    """While large parts are brought to their places the next may come."""
    copies = deque[asyncio.Future[None]]()
    async for reply in replies:
        if isinstance(reply, pb.FetchHeader):
            found.header = reply
            continue
        copy = found.take(reply)
        if len(reply.data) < COPY_APART_BYTES:
            copy()
            continue
        if len(copies) == COPIES_MAX:
            await copies.popleft()
        copies.append(asyncio.get_running_loop().run_in_executor(None, copy))
    await asyncio.gather(*copies)
    return found
