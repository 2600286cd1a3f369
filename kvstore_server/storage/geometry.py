"""Where everything lies in a segment, from a handful of numbers in its header.

Letters: n tokens of the append, e of them exact (the first), H KV heads, D head_dim, L layers. Data, in order:

    crc                 U32 [slots]     see `Layout.crc_slots`
    keys.rows           [R, H, D]       session dtype; n rows of a dense layer, e of a sign layer
    values.rows
    fit.mean_keys       F32 [L, H, D]   only if this append made the fit
    fit.mean_values
    keys.words          U32 [..]        (n - e) x words of each sign layer
    values.words
    keys.scales         F16 [..]        (n - e) x scales of each sign layer
    values.scales

Each is layer-major, then token-major; a tensor without elements is left out. The order keeps every tensor aligned to
its element without holes, and puts the checksums into the first read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from kvstore_codecs.spec import KINDS, Kind
from kvstore_server.storage.container import DTYPE_BYTES, TensorSpec

PAGE_TOKENS = 256
LAYERS_MAX = 1024
TOKENS_MAX = 1 << 32
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
    """Everything that sizes depend on. `fitted`: the means are in this object."""

    tokens: int
    exact: int
    kv_heads: int
    head_dim: int
    dtype: str
    runs: tuple[LayerRun, ...]
    fitted: bool

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


@dataclass(frozen=True)
class Layout:
    """A geometry worked out; spans count from the start of the data."""

    geometry: Geometry
    tensors: tuple[TensorSpec, ...]
    spans: dict[tuple[int, Kind], KindSpans]
    fit: tuple[Span, Span] | None
    data_bytes: int

    @property
    def pages(self) -> int:
        """Pages of 256 tokens, counted from the append's first token."""
        return -(-self.geometry.tokens // PAGE_TOKENS)

    @property
    def crc_slots(self) -> int:
        return _crc_slots(self.geometry)

    def crc_slot(self, layer: int, kind: Kind, page: int) -> int:
        return CRC_FIXED + (layer * len(KINDS) + KINDS.index(kind)) * self.pages + page

    @property
    def fit_crc_slot(self) -> int:
        """After those of all pages; 0 bytes without a fit."""
        return self.crc_slot(self.geometry.layers, "keys", 0)

    def page_spans(self, layer: int, kind: Kind, page: int) -> Iterator[tuple[Part, int, int]]:
        """(part, start, end) within that part of this layer and kind: what one page covers, empty spans left out."""
        geometry, place = self.geometry, self.spans[layer, kind]
        first, last = page * PAGE_TOKENS, min((page + 1) * PAGE_TOKENS, geometry.tokens)
        row_bytes = row_bytes_of(geometry)
        spans: list[tuple[Part, int, int]] = [
            ("rows", min(first, place.row_count) * row_bytes, min(last, place.row_count) * row_bytes)
        ]
        if place.widths is not None:
            signs = max(first - geometry.exact, 0), max(last - geometry.exact, 0)
            spans.append(("words", signs[0] * 4 * place.widths.words, signs[1] * 4 * place.widths.words))
            spans.append(("scales", signs[0] * 2 * place.widths.scales, signs[1] * 2 * place.widths.scales))
        return ((part, start, end) for part, start, end in spans if start < end)


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
    fit = [(spec.start, spec.end) for spec in specs if spec.name.startswith("fit.")]
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
        (fit[0], fit[1]) if fit else None,
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
        shape = (geometry.layers, *heads)
        for kind in KINDS:
            yield f"fit.mean_{kind}", "F32", shape, 4 * shape[0] * shape[1] * shape[2]
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
