"""Stored rows brought here: decoded to vectors, or packed as they are."""

from collections import defaultdict
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvstore_client.answers import FINEST, Precision, Sketches
from kvstore_client.errors import Internal, invalid
from kvstore_client.info import SessionInfo
from kvstore_client.link import Link
from kvstore_client.rpcs import FETCH, GET_PROJECTION
from kvstore_client.tensors import TO_PROTO, from_proto
from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind
from kvstore_codecs.transform import Basis
from kvstore_kernels.types import Signs, as_torch_dtype
from kvstore_proto.v1 import kvstore_pb2 as pb

KIND_NAMES: dict[int, Kind] = {pb.KIND_KEYS: "keys", pb.KIND_VALUES: "values"}


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
    found = await link.download(FETCH, request, _collect, timeout=timeout, affinity=info.affinity)
    size = (end - start, info.shape.kv_heads, info.shape.head_dim)
    keys, values = (torch.stack([found.rows(layer, kind, start, size, dtype) for layer in layers]) for kind in KINDS)
    return keys, values


async def fetch_sketches(
    link: Link, info: SessionInfo, *, layers: Sequence[int], start: int, end: int, timeout: float
) -> Sketches:
    """What is stored of positions [start, end), with the fit that reads it."""
    request = _request(info, layers, start, end)
    found = await link.download(FETCH, request, _collect, timeout=timeout, affinity=info.affinity)
    header = found.header
    parts: dict[tuple[int, Kind], KindRows] = {
        (layer, kind): found.sketch(layer, kind, start, end, info) for layer in layers for kind in KINDS
    }
    return Sketches(start, end, header.session.exact_end, _fit_of(found), parts)


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


@dataclass
class _Found:
    """The parts of one Fetch: (layer, kind, part) to (first position, tensor), in order."""

    header: pb.FetchHeader = field(default_factory=pb.FetchHeader)
    parts: dict[tuple[int, Kind, int], list[tuple[int, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def rows(self, layer: int, kind: Kind, start: int, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        found = self.joined(layer, kind, pb.PART_ROWS, start)
        if found is None:
            found = torch.empty((0, *size[1:]), dtype=dtype)
        if tuple(found.shape) != size or found.dtype != dtype:
            raise Internal(f"layer {layer} {kind}: {list(found.shape)} {found.dtype} came, not {list(size)} {dtype}")
        return found

    def sketch(self, layer: int, kind: Kind, start: int, end: int, info: SessionInfo) -> KindRows:
        heads, width = info.shape.kv_heads, info.shape.head_dim
        rows = self.joined(layer, kind, pb.PART_ROWS, start)
        if rows is None:
            rows = torch.empty((0, heads, width), dtype=as_torch_dtype(info.shape.dtype))
        exact = rows.shape[0]
        words = self.joined(layer, kind, pb.PART_WORDS, start + exact)
        scales = self.joined(layer, kind, pb.PART_SCALES, start + exact)
        signs = None if words is None or scales is None else Signs(words, scales)
        sketched = 0 if signs is None else signs.words.shape[0]
        if exact + sketched != end - start or (signs is not None and signs.scales.shape[0] != sketched):
            raise Internal(f"layer {layer} {kind}: {exact} rows and {sketched} sketches came for {end - start} tokens")
        return KindRows(rows, signs)

    def basis(self, kind: Kind) -> Basis | None:
        """The bases that came, in order of their layers."""
        layers = sorted(layer for layer, of_kind, part in self.parts if of_kind == kind and part == pb.PART_BASIS)
        parts = [[self.joined(layer, kind, part, 0) for layer in layers] for part in (pb.PART_BASIS, pb.PART_WEIGHTS)]
        matrix, weights = ([tensor for tensor in each if tensor is not None] for each in parts)
        if not len(matrix) == len(weights) == len(layers):
            raise Internal(f"{kind}: bases came without weights")
        return Basis(torch.stack(matrix), torch.stack(weights)) if layers else None

    def joined(self, layer: int, kind: Kind, part: int, start: int) -> Tensor | None:
        """One part's tensors end to end; None if none came. Internal if they do not follow each other from `start`."""
        pieces = self.parts.get((layer, kind, part), [])
        for first, tensor in pieces:
            if first != start:
                raise Internal(f"layer {layer} {kind}: a part starts at {first}, not {start}")
            start += tensor.shape[0]
        tensors = [tensor for _, tensor in pieces]
        return None if not tensors else tensors[0] if len(tensors) == 1 else torch.cat(tensors)


async def _collect(replies: AsyncIterable[pb.FetchResponse]) -> _Found:
    found = _Found()
    async for reply in replies:
        if reply.WhichOneof("body") == "header":
            found.header = reply.header
        else:
            part = reply.part
            key = part.layer, KIND_NAMES[part.kind], part.part
            found.parts[key].append((part.token_start, from_proto(part.tensor)))
    return found
