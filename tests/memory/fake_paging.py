"""A device in host memory, whose pages hold rows one after another: what it is given can be read back."""

import torch
from torch import Tensor

from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages, SignPages, page_bytes
from kvstore_kernels.types import SignLayout, Signs

POISON = 0xA5


class FakePaging:
    def __init__(self) -> None:
        self.packed_rows = 0

    def allocate(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), POISON, dtype=torch.uint8)

    def free_bytes(self) -> int:
        return 1 << 30

    def upload(self, host: Tensor) -> Tensor:
        return host.clone()

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def pack(self, signs: Signs, layout: SignLayout, pages: Pages, *, values: bool, keep: bool) -> None:
        self.packed_rows += len(signs.words)
        for index in range(pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS)):
            words, scales = page_parts(pages, layout, index)
            start = index * PAGE_TOKENS
            low, high = max(pages.first - start, 0), min(pages.end - start, PAGE_TOKENS)
            for part, rows in ((words, signs.words), (scales, signs.scales)):
                part[high:] = 0
                part[low:high] = rows[start + low - pages.first : start + high - pages.first]
                if not keep or index > pages.first // PAGE_TOKENS:
                    part[:low] = 0


def page_parts(pages: Pages, layout: SignLayout, index: int) -> tuple[Tensor, Tensor]:
    """words int32 [256, W] and scales float16 [256, S] of one page."""
    first = int(pages.table[index]) * PAGE_UNIT
    held = pages.slab[first : first + page_bytes(layout)]
    split = PAGE_TOKENS * 4 * layout.words
    return held[:split].view(torch.int32).view(PAGE_TOKENS, -1), held[split:].view(torch.float16).view(PAGE_TOKENS, -1)


def rows_of(stored: SignPages) -> Signs:
    """What a reader of these pages sees of its rows."""
    pages, layout = stored.pages, stored.expansion.layout
    parts = [page_parts(pages, layout, i) for i in range(pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS))]
    skip = pages.first % PAGE_TOKENS
    kept = slice(skip, skip + pages.end - pages.first)
    return Signs(torch.cat([words for words, _ in parts])[kept], torch.cat([scales for _, scales in parts])[kept])
