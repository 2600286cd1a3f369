"""Sketches on device pages, and float64 readings of what the kernels round on purpose."""

import pytest
import torch
from torch import Tensor

from kvstore_kernels.cuda.pack_page import pack_page
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, Pages, SignPages, page_bytes
from kvstore_kernels.types import Expansion, SignRows, Signs
from tests.kernels.inputs import expansion, head_parts, normal

DEVICE = torch.device("cuda", 0)
NAN_HALF = 0x7E00

EXPANSIONS = {
    "qjl": expansion((8, 8), 128, query_bits=8),
    "10 bits": expansion((8, 8), 128, query_bits=10),
    "12 bits": expansion((8, 8), 64, query_bits=12),
    "outliers": expansion((11, 11), 128, groups=2, query_bits=8),
    "offsets": expansion((4, 4), 64, offsets=True),
    "affine": expansion((8, 8), 128, groups=4, offsets=True),
    "ragged": expansion((3, 0, 9), 96),
    "ragged groups": expansion((3, 0, 8), 64, groups=2, offsets=True),
    "level": expansion((16, 16), 128, read=(5, 16)),
    "level of groups": expansion((8, 8), 64, groups=2, offsets=True, read=(3, 0)),
    "wide": expansion((24, 24), 256, query_bits=8),
    "nothing": expansion((0, 0), 64),
}
every_expansion = pytest.mark.parametrize("by", EXPANSIONS.values(), ids=EXPANSIONS.keys())


def require_device() -> None:
    """Skips the calling module where the kernels cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA device", allow_module_level=True)
    pytest.importorskip("cupy", reason="kernels are compiled by CuPy")


def worst(actual: Tensor, truth: Tensor) -> float:
    """The largest difference; infinities and NaN have to stand at the same places."""
    actual, truth = actual.cpu().double(), truth.cpu().double()
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(0.5), truth[~finite].nan_to_num(0.5))
    return float((actual - truth)[finite].abs().max()) if finite.any() else 0.0


def window(rows: SignRows, first: int, end: int) -> SignRows:
    return SignRows(Signs(rows.signs.words[first:end], rows.signs.scales[first:end]), rows.expansion)


def device_signs(signs: Signs) -> Signs:
    return Signs(signs.words.to(DEVICE), signs.scales.to(DEVICE))


def poisoned_slab(by: Expansion, pages: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random bytes for twice as many pages, and a table of `pages` of them in random order."""
    size = page_bytes(by.layout)
    random = torch.Generator().manual_seed(seed)
    slab = torch.randint(256, (max(2 * pages * size, 1),), generator=random, dtype=torch.uint8)
    table = torch.randperm(2 * pages, generator=random)[:pages] * (size // PAGE_UNIT)
    return slab.to(DEVICE), table.int().to(DEVICE)


def on_pages(rows: SignRows, *, values: bool, first: int = 0, seed: int = 0) -> SignPages:
    """`rows` as positions first, first + 1, ..; every scale beside them on their pages is NaN."""
    by, end = rows.expansion, first + len(rows.signs.words)
    pages = Pages(*poisoned_slab(by, -(-end // PAGE_TOKENS), seed), first, end)
    pack_page(device_signs(rows.signs), by.layout, pages, values=values)
    for page in {first // PAGE_TOKENS, (end - 1) // PAGE_TOKENS} if end > first else ():
        start = int(pages.table[page]) * PAGE_UNIT + 1024 * by.layout.words
        scales = pages.slab[start : start + 512 * by.layout.scales].view(torch.int16).view(-1, PAGE_TOKENS)
        scales[:, : max(0, first - page * PAGE_TOKENS)] = NAN_HALF
        scales[:, max(0, end - page * PAGE_TOKENS) :] = NAN_HALF
    return SignPages(pages, by)


def rounded_attention64(logits: Tensor, values: SignRows, weight_bits: int, first: int = 0) -> Tensor:
    """Out float64 [T, Hq, D] where p alpha is rounded to `weight_bits` bits of its largest value on the page."""
    by, heads = values.expansion, values.expansion.layout.heads
    page = (first + torch.arange(logits.shape[2])) // PAGE_TOKENS
    p = torch.softmax(logits, 2).unflatten(1, (heads, -1))
    out = []
    for head, matrix in enumerate(by.matrix):
        t, _, alphas, betas = head_parts(values, head)
        x = by.mean[head].double().expand(*p.shape[:1], p.shape[2], -1).clone()
        of_row = torch.tensor(by.layout.word_groups[head][: len(matrix) // 32]).repeat_interleave(32)
        for group in range(alphas.shape[1]):
            own = of_row == group
            weights = _rounded(p[:, head] * alphas[:, group], page, (1 << weight_bits) - 1)
            x += weights @ t[:, own] @ matrix[own].double()
        if by.offset_basis is not None:
            x += p[:, head] @ betas @ by.offset_basis[: betas.shape[1]].double()
        out.append(x)
    return torch.stack(out, 1).flatten(1, 2)


def _rounded(weights: Tensor, page: Tensor, most: int) -> Tensor:
    out = torch.empty_like(weights)
    for number in page.unique():
        own = weights[..., page == number]
        unit = own.amax(-1, keepdim=True).clamp(min=1e-300) / most
        out[..., page == number] = torch.round(own / unit) * unit
    return out


def queries(by: Expansion, tokens: int = 3, group: int = 3) -> Tensor:
    return normal(tokens, by.layout.heads * group, by.layout.head_dim, seed=5).to(DEVICE)
