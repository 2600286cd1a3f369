"""The `crc` tensor of a segment: one CRC32C per (layer, kind, page of 256 tokens), and which of them do not hold.

slot 0          of the file's bytes before the data: length prefix and padded header
slot 1          of all slots after this one
slots 2 ..      of (layer, kind, page), layers slowest: rows, then words, then scales of that page
next            of the fit, means first, if this append made it
rest            zero
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from kvstore_codecs.spec import Kind
from kvstore_server.storage.geometry import CRC_FIXED, PAGE_TOKENS, PARTS, Layout, Part

Views = Mapping[tuple[int, Kind, Part], memoryview]
CrcTable = NDArray[np.uint32]
KEEP, RELEASE = 0, 1
"""The interpreter."""
ALONE_BYTES = 256 << 10
"""From here on without it: what is shorter takes less time than to get it back from others, page for page."""


@dataclass(frozen=True)
class Damage:
    """What cannot be trusted: positions [token_start, token_end) of one layer and kind; None stands for all."""

    token_start: int
    token_end: int
    layer: int | None
    kind: Kind | Literal["fit"] | None
    what: str


def whole_damage(token_start: int, token_end: int, what: str) -> Damage:
    """All layers and kinds of these positions."""
    return Damage(token_start, token_end, None, None, what)


def crc_table(layout: Layout, head_crc: int, views: Views, fit: list[memoryview]) -> CrcTable:
    """The whole tensor for these bytes; parts that are not in `views` must be empty."""
    table = np.zeros(layout.crc_slots, "<u4")
    table[0] = head_crc
    for slot, (layer, kind, _, pieces) in enumerate(layout.checked, start=CRC_FIXED):
        crc = 0
        for part, start, end in pieces:
            crc = crc32c(views[layer, kind, part][start:end], crc, KEEP if end - start < ALONE_BYTES else RELEASE)
        table[slot] = crc
    if fit:
        crc = 0
        for view in fit:
            crc = crc32c(view, crc)
        table[layout.fit_crc_slot] = crc
    table[1] = crc32c(table[CRC_FIXED:].tobytes())
    return table


def damages(layout: Layout, start: int, body: memoryview) -> Iterator[Damage]:
    """What in `body`, the whole data of the append at `start`, differs from its checksums (the header's apart)."""
    found: CrcTable = np.frombuffer(body, "<u4", layout.crc_slots)
    views: Views = {
        (layer, kind, part): body[slice(*getattr(spans, part))]
        for (layer, kind), spans in layout.spans.items()
        for part in PARTS
    }
    expected = crc_table(layout, 0, views, [body[spec.start : spec.end] for spec in layout.fit])
    end = start + layout.geometry.tokens
    if found[1] != crc32c(found[CRC_FIXED:].tobytes()):
        yield whole_damage(start, end, "checksums")
    for index in np.flatnonzero(found[CRC_FIXED:] != expected[CRC_FIXED:]):
        if index < len(layout.checked):
            page = layout.checked[index]
            first = start + page.page * PAGE_TOKENS
            yield Damage(first, min(first + PAGE_TOKENS, end), page.layer, page.kind, "checksum")
        elif layout.fit and CRC_FIXED + index == layout.fit_crc_slot:
            yield Damage(start, end, None, "fit", "checksum")
