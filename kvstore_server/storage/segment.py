"""One append as one immutable object: how it is written, and how it is read without trusting it (docs/format.md)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from crc32c import crc32c
from torch import Tensor

from kvstore_codecs.plan import Fit
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind
from kvstore_kernels.types import Signs, as_torch_dtype
from kvstore_server.errors import DataLoss, InvalidArgument
from kvstore_server.storage.checksums import Damage, crc_table, damages, whole_damage
from kvstore_server.storage.container import DamagedError, build_header, check_tensors, data_offset, parse_header
from kvstore_server.storage.geometry import FIT, PARTS, Geometry, LayerRun, Layout, Part, SignWidths, layout_of
from kvstore_server.storage.segment_header import Identity, SegmentHeader, from_metadata, to_metadata
from kvstore_server.storage.store import Buffer

_FIT_DTYPES = {torch.float32: "F32", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _FIT_DTYPES.items()}


@dataclass(frozen=True)
class Segment:
    """One append in memory, one element of `keys` and `values` per layer. What was read are views of the object."""

    header: SegmentHeader
    keys: tuple[KindRows, ...]
    values: tuple[KindRows, ...]
    fit: Fit | None

    def of(self, layer: int, kind: Kind) -> KindRows:
        return (self.keys if kind == "keys" else self.values)[layer]


def geometry_of(
    tokens: int, exact: int, dtype: str, keys: tuple[KindRows, ...], values: tuple[KindRows, ...], fit: Fit | None
) -> Geometry:
    """The geometry of what is about to be written."""
    widths = [(_widths(k), _widths(v)) for k, v in zip(keys, values, strict=True)]
    runs = tuple(LayerRun(len(list(group)), *pair) for pair, group in groupby(widths))
    _, heads, head_dim = keys[0].rows.shape
    bases = [0 if fit is None or (basis := fit.basis_of(kind)) is None else len(basis.matrix) for kind in KINDS]
    return Geometry(tokens, exact, heads, head_dim, dtype, runs, fit is not None, *bases)


def write_segment(segment: Segment) -> list[Buffer]:
    """The object as buffers over the segment's own tensors: only tensors of another device are copied.

    InvalidArgument if the header would be over its limit; ValueError if tensors and header do not agree.
    """
    header, layout = segment.header, layout_of(segment.header.geometry)
    views = dict(_part_views(segment, layout))
    tensors = {} if segment.fit is None else segment.fit.tensors
    found = [(f"{FIT}{name}", _FIT_DTYPES.get(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    if found != [(spec.name, spec.dtype, spec.shape) for spec in layout.fit]:
        raise ValueError(f"the fit is {found}, not what the geometry says")
    fit = [_bytes_of(tensor) for tensor in tensors.values()]
    try:
        head = build_header(to_metadata(header), layout.tensors)
    except ValueError as error:
        raise InvalidArgument("block_hashes", f"{len(header.block_hashes)} are too many for one append") from error
    crcs = crc_table(layout, crc32c(head), views, fit)
    rows, words, scales = ([view for (_, kind, part), view in views.items() if part == p] for p in PARTS)
    return [head, crcs.data.cast("B"), *rows, *fit, *words, *scales]


def read_header(head: memoryview, identity: Identity) -> SegmentHeader:
    """The header from an object's first bytes, verified; DamagedError if it is damaged or not `identity`'s."""
    metadata, entries = parse_header(head)
    header = from_metadata(metadata)
    if header.identity != identity:
        raise DamagedError("the object of another append")
    check_tensors(entries, layout_of(header.geometry).tensors)
    return header


def read_segment(data: Buffer, identity: Identity) -> Segment:
    """The segment, as views of `data` (of a copy if that is read-only).

    DataLoss unless every byte is what was written for this very append; FailedPrecondition if a newer version wrote it.
    """
    try:
        segment, found = inspect_segment(data, identity)
    except DamagedError as error:
        raise data_loss(identity, whole_damage(identity.start, identity.start + 1, str(error))) from error
    if found:
        raise data_loss(identity, found[0])
    return segment


def inspect_segment(data: Buffer, identity: Identity) -> tuple[Segment, list[Damage]]:
    """As read_segment, but lists what is damaged: all else may be used. DamagedError if nothing may."""
    view = memoryview(data).cast("B")
    header = read_header(view, identity)
    layout, offset = layout_of(header.geometry), data_offset(view)
    if len(view) != offset + layout.data_bytes:
        raise DamagedError(f"{len(view)} bytes instead of {offset + layout.data_bytes}")
    if view.readonly:
        view = memoryview(bytearray(view))
    segment = _segment_of(header, layout, torch.frombuffer(view, dtype=torch.uint8)[offset:])
    return segment, list(damages(layout, header.start, view[offset:]))


def data_loss(identity: Identity, damage: Damage) -> DataLoss:
    """The error for one damaged range."""
    place = [] if damage.layer is None else [f"layer {damage.layer}"]
    what = ", ".join([damage.what, *place, *filter(None, [damage.kind])])
    return DataLoss(
        "SEGMENT_DAMAGED",
        f"session {identity.session}, positions [{damage.token_start}, {damage.token_end}): {what}",
        session=identity.session,
        generation=identity.generation,
        token_start=damage.token_start,
        token_end=damage.token_end,
    )


def no_such_fit(identity: Identity, end: int, epoch: int) -> DataLoss:
    """The error for sketches, up to position `end`, of a fit that is not among those before them."""
    what = f"sketches of fit {epoch}, which is not where it must be"
    return data_loss(identity, whole_damage(identity.start, end, what))


def _part_views(segment: Segment, layout: Layout) -> Iterator[tuple[tuple[int, Kind, Part], memoryview]]:
    """The bytes of every part that is not empty, kinds slowest, checked against the geometry."""
    geometry = layout.geometry
    dtype, row_shape = as_torch_dtype(geometry.dtype), (geometry.kv_heads, geometry.head_dim)
    for kind in KINDS:
        for layer in range(geometry.layers):
            rows, spans = segment.of(layer, kind), layout.spans[layer, kind]
            tensors: dict[Part, Tensor] = {"rows": rows.rows}
            shapes: dict[Part, tuple[torch.dtype, tuple[int, ...]]] = {"rows": (dtype, (spans.row_count, *row_shape))}
            if rows.signs is not None and spans.widths is not None:
                sketched = geometry.tokens - geometry.exact
                tensors |= {"words": rows.signs.words, "scales": rows.signs.scales}
                shapes["words"] = torch.int32, (sketched, spans.widths.words)
                shapes["scales"] = torch.float16, (sketched, spans.widths.scales)
            found = {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in tensors.items()}
            if found != shapes or (rows.signs is None) != (spans.widths is None):
                raise ValueError(f"layer {layer} {kind} is {found} instead of {shapes}")
            for part in PARTS:
                if part in tensors and tensors[part].numel():
                    yield (layer, kind, part), _bytes_of(tensors[part])


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous()
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    return flat.numpy().data.cast("B")


def _widths(rows: KindRows) -> SignWidths | None:
    return None if rows.signs is None else SignWidths(rows.signs.words.shape[1], rows.signs.scales.shape[1])


def _segment_of(header: SegmentHeader, layout: Layout, body: Tensor) -> Segment:
    fit = None
    if layout.fit and header.fit_range:
        tensors = {
            spec.name.removeprefix(FIT): body[spec.start : spec.end].view(_DTYPES[spec.dtype]).view(spec.shape)
            for spec in layout.fit
        }
        fit = Fit.from_tensors(tensors, *header.fit_range)
    keys, values = (tuple(_kind_rows(layout, body, kind)) for kind in KINDS)
    return Segment(header, keys, values, fit)


def _kind_rows(layout: Layout, body: Tensor, kind: Kind) -> Iterator[KindRows]:
    """Views of one kind, layer by layer. Splitting whole tensors takes half the time of slicing each view."""
    geometry = layout.geometry
    spans = [layout.spans[layer, kind] for layer in range(geometry.layers)]
    rows_bytes, words_bytes, scales_bytes = (
        body[getattr(spans[0], part)[0] : getattr(spans[-1], part)[1]] for part in PARTS
    )
    rows = rows_bytes.view(as_torch_dtype(geometry.dtype)).view(-1, geometry.kv_heads, geometry.head_dim)
    words = words_bytes.view(torch.int32).split([(end - start) // 4 for start, end in (s.words for s in spans)])
    scales = scales_bytes.view(torch.float16).split([(end - start) // 2 for start, end in (s.scales for s in spans)])
    sketched = geometry.tokens - geometry.exact
    for layer, layer_rows in enumerate(rows.split([s.row_count for s in spans])):
        widths = spans[layer].widths
        if widths is None:
            yield KindRows(layer_rows, None)
        else:
            shapes = (sketched, widths.words), (sketched, widths.scales)
            yield KindRows(layer_rows, Signs(words[layer].view(shapes[0]), scales[layer].view(shapes[1])))
