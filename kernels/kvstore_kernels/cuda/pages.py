"""Stored rows on device pages, and an expansion's tensors as the kernels want them.

A page holds 256 positions of one layer and kind: 1024 bytes for each word of a token's row, then 512 bytes for each of
its scales, as `csrc/logits.cuh` and `csrc/attend.cu` say. Position n lies in page n // 256 at row n % 256, whatever is
read.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from kvstore_kernels.cuda.kept import kept
from kvstore_kernels.types import WORD_ROWS, Expansion, SignLayout

PAGE_TOKENS = 256
PAGE_UNIT = 512
"""Page tables count in units of this many bytes."""
UNIT_WORDS = 8
"""Words of a head that one tensor-core product takes."""


def page_bytes(layout: SignLayout) -> int:
    """Bytes of one page: a whole number of page units."""
    return PAGE_TOKENS * layout.bytes_per_token


@dataclass(frozen=True)
class Pages:
    """Rows [first, end) of one layer and kind of one session.

    `slab` uint8 [bytes] holds pages of many; page i of these begins at byte 512 * table[i], `table` int32 [pages]. Rows
    outside [first, end) are never read as numbers.
    """

    slab: Tensor
    table: Tensor
    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.end <= len(self.table) * PAGE_TOKENS:
            raise ValueError(f"rows [{self.first}, {self.end}) do not lie in {len(self.table)} pages of {PAGE_TOKENS}")
        if self.table.dtype != torch.int32 or self.slab.dtype != torch.uint8:
            raise ValueError(f"the slab is {self.slab.dtype} and its table {self.table.dtype}, not uint8 and int32")


@dataclass(frozen=True)
class SignPages:
    """Stored sign sketches on device pages with the expansion that reads them."""

    pages: Pages
    expansion: Expansion


@dataclass(frozen=True)
class DeviceExpansion:
    """An expansion on a device. Each head's matrix begins at row 0; the mean is row `width`, then the offset basis."""

    matrix: Tensor  # [H, length, D] float32, 0 between a head's rows and the mean
    heads: Tensor  # [H, 4] int32: first word and first scale row of the page, words read, words stored
    units: Tensor  # [H, units, 9] int32: scale group and words of each product
    groups: Tensor  # [H, words] uint8: scale group of each word read
    noise: Tensor  # [H, width] float32
    words: int
    """Of the head that reads most."""

    @property
    def width(self) -> int:
        return self.noise.shape[1]

    @property
    def length(self) -> int:
        return self.matrix.shape[1]


@cache
def key_blocks(layout: SignLayout, device: torch.device) -> Tensor:
    """int32 [2, W]: the first word of the block that each word of a token lies in, and how many words it has."""
    starts, counts = list[int](), list[int]()
    for first, end in pairwise(layout.word_starts):
        for word in range(first, end):
            starts.append(word - (word - first) % UNIT_WORDS)
            counts.append(min(UNIT_WORDS, end - starts[-1]))
    return torch.tensor([starts, counts], dtype=torch.int32).to(device)


@kept
def on_device(expansion: Expansion, device: torch.device) -> DeviceExpansion:
    """`expansion` as the kernels want it."""
    layout = expansion.layout
    words = [expansion.read_words(head) for head in range(layout.heads)]
    width = max(1, *words) * WORD_ROWS
    matrix = torch.zeros(layout.heads, width + 1 + layout.groups * layout.has_offsets, layout.head_dim)
    matrix[:, width] = expansion.mean
    noise = torch.zeros(layout.heads, width)
    groups = torch.zeros(layout.heads, width // WORD_ROWS, dtype=torch.uint8)
    units, heads = [], []
    for head, own in enumerate(words):
        stored = layout.word_groups[head]
        matrix[head, : own * WORD_ROWS] = expansion.matrix[head]
        noise[head, : own * WORD_ROWS] = expansion.noise[head]
        groups[head, :own] = torch.tensor(stored[:own], dtype=torch.uint8)
        if stored and expansion.offset_basis is not None:
            matrix[head, width + 1 :] = expansion.offset_basis
        units.append(_units(stored[:own], layout.groups, max(words)))
        heads.append((layout.word_starts[head], 2 * layout.words + layout.scale_starts[head], own, len(stored)))
    count = max(1, *map(len, units))
    absent = [0] + [max(words)] * UNIT_WORDS
    return DeviceExpansion(
        matrix=matrix.to(device),
        heads=torch.tensor(heads, dtype=torch.int32).to(device),
        units=torch.tensor([own + [absent] * (count - len(own)) for own in units], dtype=torch.int32).to(device),
        groups=groups.to(device),
        noise=noise.to(device),
        words=max(words),
    )


def _units(word_groups: tuple[int, ...], groups: int, absent: int) -> list[list[int]]:
    """Words in eights that share a scale: [group, word, ..] with `absent` where there is none."""
    units = []
    for group in range(groups):
        own = [word for word, of in enumerate(word_groups) if of == group]
        for start in range(0, len(own), UNIT_WORDS):
            eight = own[start : start + UNIT_WORDS]
            units.append([group, *eight, *[absent] * (UNIT_WORDS - len(eight))])
    return units
