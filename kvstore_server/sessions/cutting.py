"""Drops the bits that levels finer than a floor read, and makes room for them again where sketches are read whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvstore_codecs.plan import CodecPlan, KindPlan, SignPlan
from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS
from kvstore_kernels import Signs
from kvstore_server.storage.meta import Floor
from kvstore_server.storage.segment import Segment


def cut_segment(segment: Segment, plans: Sequence[CodecPlan], floor: Floor) -> Segment:
    """With only those words that the floor reads; its geometry is that of the object it came from.

    `plans` are those of the session's epochs.
    """
    found, plan = segment.header.floor, plans[segment.header.epoch]
    keys, values = (
        tuple(
            _narrowed(widened(rows, plan.of(layer, kind), found[number]), plan.of(layer, kind), floor[number])
            for layer, rows in enumerate((segment.keys, segment.values)[number])
        )
        for number, kind in enumerate(KINDS)
    )
    return Segment(segment.header, keys, values, segment.fit)


def widened(rows: KindRows, plan: KindPlan, level: int) -> KindRows:
    """Rows of an object that was cut to `level` as they are laid out whole; the bits that are gone are zero.

    ValueError if its words are not those of that level.
    """
    if rows.signs is None or not isinstance(plan, SignPlan):
        return rows
    columns, (count, found) = _columns(plan, level), rows.signs.words.shape
    if found != len(columns):
        raise ValueError(f"{found} words a token instead of the {len(columns)} of level {level}")
    words = rows.signs.words.new_zeros((count, plan.layout.words))
    words[:, columns] = rows.signs.words
    return KindRows(rows.rows, Signs(words, rows.signs.scales))


def _narrowed(rows: KindRows, plan: KindPlan, level: int) -> KindRows:
    if rows.signs is None or not isinstance(plan, SignPlan):
        return rows
    return KindRows(rows.rows, Signs(rows.signs.words[:, _columns(plan, level)].contiguous(), rows.signs.scales))


def _columns(plan: SignPlan, level: int) -> Tensor:
    """Which of a token's words a level reads, or the coarsest there is."""
    expansion, starts = plan.levels[min(level, len(plan.levels) - 1)], plan.layout.word_starts
    return torch.cat(
        [torch.arange(starts[head], starts[head] + expansion.read_words(head)) for head in range(plan.layout.heads)]
    )
