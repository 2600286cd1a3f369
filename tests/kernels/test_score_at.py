"""What torch gathers from device pages, on pages that are laid out here as the kernels have them."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels.backend import ReferenceBackend
from kvstore_kernels.cuda import score_at
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, DeviceExpansion, Pages, SignPages, page_bytes
from kvstore_kernels.types import Expansion, SignRows
from tests.kernels.inputs import expansion, sign_rows
from tests.kernels.test_score import queries

EXPANSIONS = {
    "8 bits": expansion((8, 8), 128, query_bits=8),
    "ragged": expansion((3, 0, 9), 96),
    "level": expansion((16, 16), 128, read=(5, 16)),
    "level of groups": expansion((8, 8), 64, groups=2, offsets=True, read=(3, 0)),
    "outliers": expansion((11, 11), 128, groups=2, query_bits=8),
    "wide": expansion((24, 24), 256),
}


def expanded(q: Tensor, basis: DeviceExpansion) -> Tensor:
    """As expand.cu."""
    rows = q.unflatten(1, (len(basis.matrix), -1)).transpose(0, 1).flatten(1, 2)
    return (rows.double() @ basis.matrix.double().transpose(1, 2)).float()


def on_pages(rows: SignRows, first: int) -> SignPages:
    """Keys as positions first, first + 1, .. on pages in reverse, among bytes of any content."""
    layout, end = rows.expansion.layout, first + len(rows.signs.words)
    count, size = -(-end // PAGE_TOKENS), page_bytes(layout)
    slab = torch.randint(256, (count * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    table = torch.arange(count - 1, -1, -1, dtype=torch.int32) * (size // PAGE_UNIT)
    for token in range(first, end):
        row, start = token % PAGE_TOKENS, int(table[token // PAGE_TOKENS]) * PAGE_UNIT
        words, scales = slab[start:].view(torch.uint8)[: 1024 * layout.words], slab[start + 1024 * layout.words :]
        g, place = row % 32 // 4, ((0, 2, 1, 3), (1, 3, 0, 2))[row % 32 // 4 // 2 % 2].index(row % 4)
        for begin, stop in zip(layout.word_starts, layout.word_starts[1:], strict=False):
            for block in range(begin, stop, 8):
                many = min(8, stop - block)
                at = words[block * 1024 :][: many * 1024].view(torch.int32).view(8, many, 8, 4)
                at[row // 32, :, g, place] = rows.signs.words[token - first, block : block + many]
        scales[: 512 * layout.scales].view(torch.float16).view(-1, PAGE_TOKENS)[:, row] = rows.signs.scales[
            token - first
        ]
    return SignPages(Pages(slab, table, first, end), rows.expansion)


@pytest.mark.parametrize("by", EXPANSIONS.values(), ids=EXPANSIONS)
@pytest.mark.parametrize("first", [0, 5])
def test_chosen_tokens_score_as_the_reference_says(by: Expansion, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_at, "expand", expanded)
    monkeypatch.setattr(score_at, "WORDS_MOST", 500)  # several pieces
    rows, q = sign_rows(300, by), queries(by, 2)
    positions = torch.randint(300, (*q.shape[:2], 21), generator=torch.Generator().manual_seed(2))
    for cap in (0.0, 5.0):
        how = {"sm_scale": 0.1, "logit_soft_cap": cap}
        found = score_at.score_at(q, on_pages(rows, first), positions, **how)
        expected = ReferenceBackend().score_at(q, rows, positions, **how)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
