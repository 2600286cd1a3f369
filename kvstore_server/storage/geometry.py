"""Where everything lies in a segment, from a handful of numbers in its header.

Letters: n tokens of the append, e of them exact (the first), H KV heads, D head_dim, L layers. Data, in order:

    crc                 U32 [slots]     see `Layout.crc_slots`
    keys.rows           [R, H, D]       session dtype; n rows of a dense layer, e of a sign layer
    values.rows
    fit.mean_keys       F32 [L, H, D]   only if this append made the fit
    fit.mean_values
    fit.basis_keys      F16 [B, H, D, D]   only of the B layers whose basis it made
    fit.weights_keys    F32 [B, H, D]
    fit.basis_values
    fit.weights_values
    keys.words          U32 [..]        (n - e) x words of each sign layer
    values.words
    keys.scales         F16 [..]        (n - e) x scales of each sign layer
    values.scales

Each is layer-major, then token-major; a tensor without elements is left out. The order keeps every tensor aligned to
its element without holes, and puts the checksums into the first read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from kvstore_codecs.spec import KINDS, Kind
from kvstore_server.storage.container import DTYPE_BYTES, TensorSpec

PAGE_TOKENS = 256
LAYERS_MAX = 1024
TOKENS_MAX = 1 << 32
FIT = "fit."
CRC_FIXED = 2
CRC_SLOT_MULTIPLE = 16
ROW_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Part = Literal["rows", "words", "scales"]
PARTS: tuple[Part, Part, Part] = ("rows", "words", "scales")
PerToken = Annotated[int, Field(ge=0, le=1 << 20)]
Span = tuple[int, int]
Table = Iterator[tuple[str, str, tuple[int, ...], int]]


class SignWidths(NamedTuple):
    """Words and scales of one token of a sign layer."""

    words: PerToken
    scales: PerToken


class LayerRun(NamedTuple):
    """`layers` equal layers in a row; None is a dense layer: all its tokens are rows."""

    layers: Annotated[int, Field(ge=1, le=LAYERS_MAX)]
    keys: SignWidths | None
    values: SignWidths | None


@dataclass(frozen=True)
class Geometry:
    """Everything that sizes depend on. `fitted`: the means are in this object, and the bases of so many layers."""

    tokens: int
    exact: int
    kv_heads: int
    head_dim: int
    dtype: str
    runs: tuple[LayerRun, ...]
    fitted: bool
    basis_keys: int = 0
    basis_values: int = 0

    @property
    def layers(self) -> int:
        return sum(run.layers for run in self.runs)


class KindSpans(NamedTuple):
    """One layer and kind: how many rows, its widths, and its byte spans in the data."""

    row_count: int
    widths: SignWidths | None
    rows: Span
    words: Span
    scales: Span


class CheckedPage(NamedTuple):
    """What one checksum is over: pieces (part, start, end) within the parts of this layer and kind."""

    layer: int
    kind: Kind
    page: int
    pieces: tuple[tuple[Part, int, int], ...]


@dataclass(frozen=True)
class Layout:
    """A geometry worked out; spans count from the start of the data."""

    geometry: Geometry
    tensors: tuple[TensorSpec, ...]
    spans: dict[tuple[int, Kind], KindSpans]
    fit: tuple[TensorSpec, ...]
    data_bytes: int

    @property
    def pages(self) -> int:
        """Pages of 256 tokens, counted from the append's first token."""
        return -(-self.geometry.tokens // PAGE_TOKENS)

    @property
    def crc_slots(self) -> int:
        return _crc_slots(self.geometry)

    @property
    def fit_crc_slot(self) -> int:
        """After those of all pages."""
        return CRC_FIXED + self.geometry.layers * len(KINDS) * self.pages

    @cached_property
    def checked(self) -> tuple[CheckedPage, ...]:
        """Every page of every layer and kind, in the order of their checksums, from slot CRC_FIXED on."""
        return tuple(
            CheckedPage(layer, kind, page, tuple(self._page_pieces(self.spans[layer, kind], page)))
            for layer in range(self.geometry.layers)
            for kind in KINDS
            for page in range(self.pages)
        )

    def _page_pieces(self, place: KindSpans, page: int) -> Iterator[tuple[Part, int, int]]:
        geometry = self.geometry
        tokens = page * PAGE_TOKENS, min((page + 1) * PAGE_TOKENS, geometry.tokens)
        start, end = (row_bytes_of(geometry) * min(token, place.row_count) for token in tokens)
        if start < end:
            yield "rows", start, end
        words, scales = place.widths or (0, 0)
        start, end = (max(token - geometry.exact, 0) for token in tokens)
        if words and start < end:
            yield "words", 4 * words * start, 4 * words * end
        if scales and start < end:
            yield "scales", 2 * scales * start, 2 * scales * end


def row_bytes_of(geometry: Geometry) -> int:
    return geometry.kv_heads * geometry.head_dim * DTYPE_BYTES[ROW_DTYPES[geometry.dtype]]


@lru_cache(maxsize=64)
def layout_of(geometry: Geometry) -> Layout:
    """Cached: appends of one session mostly have one of two shapes."""
    layers = [(run.keys, run.values) for run in geometry.runs for _ in range(run.layers)]
    widths = {kind: [layer[i] for layer in layers] for i, kind in enumerate(KINDS)}
    sizes: dict[tuple[Kind, Part], list[int]] = {
        (kind, part): [_part_bytes(geometry, w, part) for w in widths[kind]] for kind in KINDS for part in PARTS
    }
    shapes = list(_tensors(geometry, {name: sum(each) for name, each in sizes.items()}))
    ends = list(accumulate(size for *_, size in shapes))
    specs = [TensorSpec(*shape[:3], end - shape[3], end) for shape, end in zip(shapes, ends, strict=True)]
    at = {spec.name: spec.start for spec in specs}
    spans = {(kind, part): list(_spans(at.get(f"{kind}.{part}", 0), each)) for (kind, part), each in sizes.items()}
    fit = tuple(spec for spec in specs if spec.name.startswith(FIT))
    return Layout(
        geometry,
        tuple(specs),
        {
            (layer, kind): KindSpans(
                geometry.tokens if w is None else geometry.exact, w, *(spans[kind, part][layer] for part in PARTS)
            )
            for kind in KINDS
            for layer, w in enumerate(widths[kind])
        },
        fit,
        ends[-1],
    )


def _tensors(geometry: Geometry, totals: dict[tuple[Kind, Part], int]) -> Table:
    """(name, dtype, shape, bytes) in the order of the data."""
    slots, heads = _crc_slots(geometry), (geometry.kv_heads, geometry.head_dim)
    yield "crc", "U32", (slots,), 4 * slots
    for kind in KINDS:
        if size := totals[kind, "rows"]:
            yield f"{kind}.rows", ROW_DTYPES[geometry.dtype], (size // row_bytes_of(geometry), *heads), size
    if geometry.fitted:
        vectors = 4 * heads[0] * heads[1]
        for kind in KINDS:
            yield f"{FIT}mean_{kind}", "F32", (geometry.layers, *heads), geometry.layers * vectors
        for kind, count in zip(KINDS, (geometry.basis_keys, geometry.basis_values), strict=True):
            if count:
                yield f"{FIT}basis_{kind}", "F16", (count, *heads, heads[1]), count * vectors * heads[1] // 2
                yield f"{FIT}weights_{kind}", "F32", (count, *heads), count * vectors
    for kind in KINDS:
        if size := totals[kind, "words"]:
            yield f"{kind}.words", "U32", (size // 4,), size
    for kind in KINDS:
        if size := totals[kind, "scales"]:
            yield f"{kind}.scales", "F16", (size // 2,), size


def _part_bytes(geometry: Geometry, widths: SignWidths | None, part: Part) -> int:
    if part == "rows":
        return (geometry.tokens if widths is None else geometry.exact) * row_bytes_of(geometry)
    if widths is None:
        return 0
    per_token = 4 * widths.words if part == "words" else 2 * widths.scales
    return (geometry.tokens - geometry.exact) * per_token


def _crc_slots(geometry: Geometry) -> int:
    """Two fixed ones, one per (layer, kind, page), one for the fit, then zeros up to a multiple of 64 bytes."""
    pages = -(-geometry.tokens // PAGE_TOKENS)
    used = CRC_FIXED + geometry.layers * len(KINDS) * pages + geometry.fitted
    return -(-used // CRC_SLOT_MULTIPLE) * CRC_SLOT_MULTIPLE


def _spans(start: int, sizes: list[int]) -> Iterator[Span]:
    return pairwise(accumulate(sizes, initial=start))
