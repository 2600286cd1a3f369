"""Neighbouring appends of one session as one object, which says of each what its own header said."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind
from kvstore_kernels.types import Signs
from kvstore_server.storage.meta import Floor
from kvstore_server.storage.segment import Segment, geometry_of
from kvstore_server.storage.segment_header import MergedAppend, SegmentHeader


def merged_segment(segments: Sequence[Segment], created_unix_seconds: float, floor: Floor = (0, 0)) -> Segment:
    """Appends that follow each other, merged before or not, all cut to the same floor, as one segment.

    Exact tokens lead a session, so they lead the merged object too. ValueError unless all are of one epoch.
    """
    first = segments[0].header
    appends = tuple(append for segment in segments for append in _appends(segment.header))
    with_fit = [number for number, segment in enumerate(segments) if segment.fit is not None]
    if len(with_fit) > 1 or len({segment.header.epoch for segment in segments}) > 1:
        raise ValueError("sketches of several fits cannot be merged")
    fit, fit_range, fit_append = None, None, None
    if with_fit:
        maker = segments[with_fit[0]]
        fit, fit_range = maker.fit, maker.header.fit_range
        fit_append = sum(len(_appends(segment.header)) for segment in segments[: with_fit[0]])
        fit_append += maker.header.fit_append or 0
    keys, values = (tuple(_joined(segments, layer, kind) for layer in range(first.geometry.layers)) for kind in KINDS)
    geometries = [segment.header.geometry for segment in segments]
    tokens, exact = sum(each.tokens for each in geometries), sum(each.exact for each in geometries)
    header = replace(
        first,
        geometry=geometry_of(tokens, exact, first.geometry.dtype, keys, values, fit),
        digest=_digest(first.start, floor, appends),
        fit_range=fit_range,
        fit_append=fit_append,
        block_hashes=(),
        block_tokens=0,
        created_unix_seconds=created_unix_seconds,
        appends=appends,
        floor=floor,
    )
    return Segment(header, keys, values, fit)


def _appends(header: SegmentHeader) -> tuple[MergedAppend, ...]:
    alone = MergedAppend(
        header.tokens,
        header.digest,
        header.encoding,
        header.encoded_by,
        header.created_unix_seconds,
        header.block_tokens,
        header.block_hashes,
    )
    return header.appends or (alone,)


def _digest(start: int, floor: Floor, appends: Sequence[MergedAppend]) -> str:
    lines = "".join(f"{append.tokens} {append.digest}\n" for append in appends)
    return hashlib.sha256(f"kvstore.merged {start} {floor[0]} {floor[1]}\n{lines}".encode()).hexdigest()


def _joined(segments: Sequence[Segment], layer: int, kind: Kind) -> KindRows:
    """Before the fit every layer is kept as rows: of those that are kept as signs later, all of them exact."""
    parts = [segment.of(layer, kind) for segment in segments]
    rows = torch.cat([part.rows for part in parts])
    signs = [part.signs for part in parts if part.signs is not None]
    if not signs:
        return KindRows(rows, None)
    return KindRows(rows, Signs(torch.cat([each.words for each in signs]), torch.cat([each.scales for each in signs])))
