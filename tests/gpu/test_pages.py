"""pack_page against the layout of a page as csrc/logits.cuh and csrc/attend.cu describe it."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels.cuda.pack_page import pack_page
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages
from kvstore_kernels.types import Expansion, SignLayout, Signs
from tests.gpu import inputs
from tests.gpu.inputs import device_signs, every_expansion, poisoned_slab
from tests.kernels.inputs import expansion, sign_rows

inputs.require_device()
pytestmark = pytest.mark.gpu
either_kind = pytest.mark.parametrize("values", [False, True], ids=["keys", "values"])
BLOCK_WORDS = 8


def key_words(page: Tensor, layout: SignLayout) -> Tensor:
    """int32 [256, W] from a page's words as int32."""
    out = torch.empty(PAGE_TOKENS, layout.words, dtype=torch.int32)
    for start, end in zip(layout.word_starts, layout.word_starts[1:], strict=False):
        for first in range(start, end, BLOCK_WORDS):
            count = min(BLOCK_WORDS, end - first)
            block = page[first * PAGE_TOKENS : (first + count) * PAGE_TOKENS].view(8, count, 8, 4)
            for g in range(8):
                for i, token in enumerate((1, 3, 0, 2) if g & 2 else (0, 2, 1, 3)):
                    out[4 * g + token :: 32, first : first + count] = block[:, :, g, i]
    return out


def value_words(page: Tensor, layout: SignLayout) -> Tensor:
    """The same of a page of values."""
    tiles = page[: layout.words * PAGE_TOKENS].view(
        layout.words, 2, 8, 4, 2, 2
    )  # word, tile, g, t, s, upper or lower row
    rows = tiles.permute(3, 4, 0, 1, 5, 2).reshape(4, 2, layout.words, 32).long()  # t, s, word, channel
    out = torch.zeros(PAGE_TOKENS, layout.words, dtype=torch.int64)
    for bit in range(32):
        i, j, c = bit >> 4, bit >> 3 & 1, bit & 7
        for t in range(4):
            for s in range(2):
                bits = rows[t, s] >> bit & 1
                out[32 * c + 4 * (2 * t + i) + 2 * s + j] = (bits << torch.arange(32)).sum(1)
    return torch.where(out >= 2**31, out - 2**32, out).int()


def read(pages: Pages, number: int, layout: SignLayout, values: bool) -> Signs:
    """All 256 rows of page `number`."""
    start = int(pages.table[number]) * PAGE_UNIT
    words = pages.slab[start : start + 1024 * layout.words].cpu().view(torch.int32)
    scales = pages.slab[start + 1024 * layout.words :][: 512 * layout.scales].cpu().view(torch.float16)
    return Signs((value_words if values else key_words)(words, layout), scales.view(-1, PAGE_TOKENS).T)


def assert_rows(signs: Signs, rows: slice, expected: Signs) -> None:
    assert torch.equal(signs.words[rows], expected.words)
    assert torch.equal(signs.scales[rows].view(torch.int16), expected.scales.view(torch.int16))


def cut(signs: Signs, start: int, end: int) -> Signs:
    return Signs(signs.words[start:end], signs.scales[start:end])


def zeros(rows: int, layout: SignLayout) -> Signs:
    return Signs(
        torch.zeros(rows, layout.words, dtype=torch.int32), torch.zeros(rows, layout.scales, dtype=torch.float16)
    )


@either_kind
@every_expansion
def test_a_full_page_and_a_partial_one_over_poison(by: Expansion, values: bool) -> None:
    rows, layout = sign_rows(300, by).signs, by.layout
    pages = Pages(*poisoned_slab(by, 2), 0, 300)
    pack_page(device_signs(rows), layout, pages, values=values)
    assert_rows(read(pages, 0, layout, values), slice(None), cut(rows, 0, 256))
    last = read(pages, 1, layout, values)
    assert_rows(last, slice(0, 44), cut(rows, 256, 300))
    assert_rows(last, slice(44, None), zeros(212, layout))


@either_kind
@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 2), (31, 33), (100, 256), (255, 257), (200, 700)])
def test_an_append_keeps_what_lies_before_it(first: int, end: int, values: bool) -> None:
    by = expansion((9, 3), 64, groups=2, offsets=True)
    rows, layout = sign_rows(end, by).signs, by.layout
    slab, table = poisoned_slab(by, 3)
    if first:
        pack_page(device_signs(cut(rows, 0, first)), layout, Pages(slab, table, 0, first), values=values)
    pages = Pages(slab, table, first, end)
    pack_page(device_signs(cut(rows, first, end)), layout, pages, values=values, keep=True)
    for number in range(-(-end // PAGE_TOKENS)):
        here = cut(rows, number * PAGE_TOKENS, min(end, (number + 1) * PAGE_TOKENS))
        page = read(pages, number, layout, values)
        assert_rows(page, slice(0, len(here.words)), here)
        assert_rows(page, slice(len(here.words), None), zeros(PAGE_TOKENS - len(here.words), layout))


@either_kind
def test_without_keep_nothing_of_an_earlier_owner_is_left(values: bool) -> None:
    by = expansion((5, 5), 64, groups=2)
    rows, layout = sign_rows(10, by).signs, by.layout
    pages = Pages(*poisoned_slab(by, 1), 20, 30)
    pack_page(device_signs(rows), layout, pages, values=values)
    page = read(pages, 0, layout, values)
    assert_rows(page, slice(0, 20), zeros(20, layout))
    assert_rows(page, slice(20, 30), rows)
    assert_rows(page, slice(30, None), zeros(226, layout))


@either_kind
def test_pages_beside_those_written_stay_as_they_are(values: bool) -> None:
    by = expansion((4, 4), 64)
    slab, table = poisoned_slab(by, 2)
    before = slab.clone()
    size = len(slab) // 4
    pack_page(device_signs(sign_rows(300, by).signs), by.layout, Pages(slab, table, 0, 300), values=values)
    written = {int(entry) * PAGE_UNIT // size for entry in table}
    for number in range(4):
        same = torch.equal(slab[number * size :][:size], before[number * size :][:size])
        assert same is (number not in written)


def test_rows_that_do_not_fit_the_pages_are_refused() -> None:
    by = expansion((4, 4), 64)
    with pytest.raises(ValueError, match="for 5 rows"):
        pack_page(device_signs(sign_rows(4, by).signs), by.layout, Pages(*poisoned_slab(by, 1), 0, 5), values=False)
    with pytest.raises(ValueError, match="do not lie in 1 pages"):
        Pages(*poisoned_slab(by, 1), 0, 257)
