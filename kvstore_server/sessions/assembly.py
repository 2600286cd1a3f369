"""Frames of one append, in any order, back to whole tensors; a stream that lies about itself never gets that far."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_codecs.plan import CodecPlan
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import DTYPE_BYTES, KINDS, Kind, ModelShape
from kvstore_kernels import Signs, as_torch_dtype
from kvstore_server.errors import InvalidArgument
from kvstore_server.memory.growing import Allocate, pageable
from kvstore_server.storage.geometry import PARTS, Part

Encoding = Literal["raw", "sketch"]


@dataclass(frozen=True)
class AppendHeader:
    """What an append says of itself before its first frame."""

    session: str
    generation: str
    start: int
    tokens: int
    data_bytes: int
    encoding: Encoding
    fit_fingerprint: str = ""
    block_hashes: tuple[bytes, ...] = ()
    block_tokens: int = 0


@dataclass(frozen=True)
class Frame:
    """A piece of one part: tokens [token_offset, token_offset + tokens) of the append, heads [head_offset, + heads)."""

    layer: int
    kind: Kind
    part: Part
    token_offset: int
    tokens: int
    head_offset: int
    heads: int
    data: bytes | memoryview


class PartBuffer:
    """One (layer, kind, part): bytes [tokens, heads, row_bytes], and which cells have come."""

    def __init__(self, allocate: Allocate, first: int, tokens: int, heads: int, row_bytes: int) -> None:
        self.first = first
        self.tensor = allocate((tokens, heads, row_bytes), torch.uint8)
        self.bytes: NDArray[np.uint8] = self.tensor.numpy()
        self._filled = np.zeros((tokens, heads), dtype=bool)

    def place(self, frame: Frame) -> Callable[[], None]:
        """Gives a frame its cells; what it returns copies the bytes."""
        tokens, heads, row_bytes = self.bytes.shape
        start = frame.token_offset - self.first
        _check_range("frame.tokens", start, frame.tokens, tokens)
        head_offset, count = (frame.head_offset, frame.heads) if frame.part == "rows" else (0, 1)
        _check_range("frame.heads", head_offset, count, heads)
        expected = frame.tokens * count * row_bytes
        if len(frame.data) != expected:
            raise InvalidArgument("frame.data", f"{len(frame.data)} bytes instead of {expected}", limit=expected)
        cells = np.s_[start : start + frame.tokens, head_offset : head_offset + count]
        if self._filled[cells].any():
            raise InvalidArgument("frame.token_offset", "two frames carry the same cells")
        self._filled[cells] = True
        arrived = np.frombuffer(frame.data, dtype=np.uint8).reshape(frame.tokens, count, row_bytes)
        return lambda: np.copyto(self.bytes[cells], arrived)

    @property
    def complete(self) -> bool:
        return bool(self._filled.all())


class AppendAssembly:
    """Collects the frames of one append of known shape.

    `exact` leading tokens stay exact; they matter for sketches only, where sign layers send them as rows. The header's
    byte count must be what shape and codec say: it is checked before anything is allocated.
    """

    def __init__(
        self,
        header: AppendHeader,
        shape: ModelShape,
        plan: CodecPlan | None,
        exact: int,
        allocate: Allocate = pageable,
    ) -> None:
        self.header, self._shape = header, shape
        self._plan = plan if header.encoding == "sketch" else None
        self._exact = exact
        geometry = list(self._geometry())
        expected = sum(tokens * heads * row_bytes for _, _, tokens, heads, row_bytes in geometry)
        if header.data_bytes != expected:
            raise InvalidArgument("header.bytes", f"{header.data_bytes} instead of {expected}", limit=expected)
        self._buffers = {key: PartBuffer(allocate, *place) for key, *place in geometry}

    def add(self, frame: Frame) -> Callable[[], None]:
        """Takes one frame; InvalidArgument if it does not fit or overlaps an earlier one.

        What it returns copies the frame's bytes and may be called on any thread.
        """
        if not 0 <= frame.layer < self._shape.layers:
            raise InvalidArgument("frame.layer", f"{frame.layer} is outside [0, {self._shape.layers})")
        buffer = self._buffers.get((frame.layer, frame.kind, frame.part))
        if buffer is None:
            raise InvalidArgument("frame.part", f"layer {frame.layer} {frame.kind} has no {frame.part} in this append")
        return buffer.place(frame)

    def check_complete(self) -> None:
        """InvalidArgument naming the first part that is not whole."""
        for (layer, kind, part), buffer in self._buffers.items():
            if not buffer.complete:
                raise InvalidArgument("frames", f"the stream ended before layer {layer} {kind} {part} was whole")

    def sent(self) -> Iterator[tuple[int, Kind, list[memoryview]]]:
        """The bytes as sent, per (layer, kind) in order: rows, words, scales."""
        for layer in range(self._shape.layers):
            for kind in KINDS:
                found = (self._buffers.get((layer, kind, part)) for part in PARTS)
                yield layer, kind, [buffer.bytes.reshape(-1).data for buffer in found if buffer is not None]

    def vectors(self, layer: int, kind: Kind) -> Tensor:
        """[n, H, D] of a raw append."""
        return self._tensor(layer, kind, "rows", as_torch_dtype(self._shape.dtype))

    def sketches(self, layer: int, kind: Kind) -> KindRows:
        """What a client that encodes has sent."""
        widths = self._require_plan().of(layer, kind).widths
        dtype = as_torch_dtype(self._shape.dtype)
        if widths is None:
            return KindRows(self.vectors(layer, kind), None)
        if self._exact:
            rows = self.vectors(layer, kind)
        else:
            rows = torch.empty((0, self._shape.kv_heads, self._shape.head_dim), dtype=dtype)
        sketched = self.header.tokens - self._exact
        words = torch.empty((sketched, 0), dtype=torch.int32)
        scales = torch.empty((sketched, 0), dtype=torch.float16)
        if sketched and widths.words:
            words = self._tensor(layer, kind, "words", torch.int32)[:, 0]
        if sketched and widths.scales:
            scales = self._tensor(layer, kind, "scales", torch.float16)[:, 0]
        return KindRows(rows, Signs(words, scales))

    def _tensor(self, layer: int, kind: Kind, part: Part, dtype: torch.dtype) -> Tensor:
        return self._buffers[layer, kind, part].tensor.view(dtype)

    def _geometry(self) -> Iterator[tuple[tuple[int, Kind, Part], int, int, int, int]]:
        """(key, first token, tokens, heads, bytes of a row) of every part that must come."""
        tokens, shape = self.header.tokens, self._shape
        row_bytes = shape.head_dim * DTYPE_BYTES[shape.dtype]
        for layer in range(shape.layers):
            for kind in KINDS:
                plan = None if self._plan is None else self._plan.of(layer, kind)
                widths = None if plan is None else plan.widths
                exact = tokens if widths is None else self._exact
                if exact:
                    yield (layer, kind, "rows"), 0, exact, shape.kv_heads, row_bytes
                if widths is not None and tokens > exact:
                    if widths.words:
                        yield (layer, kind, "words"), exact, tokens - exact, 1, 4 * widths.words
                    if widths.scales:
                        yield (layer, kind, "scales"), exact, tokens - exact, 1, 2 * widths.scales

    def _require_plan(self) -> CodecPlan:
        assert self._plan is not None
        return self._plan


def _check_range(field: str, start: int, count: int, limit: int) -> None:
    if count < 1 or start < 0 or start + count > limit:
        raise InvalidArgument(field, f"[{start}, {start + count}) is outside [0, {limit})", limit=limit)
