"""Estimated attention logits of stored sign sketches on device pages."""

from collections.abc import Iterator
from math import log

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.expand import expand
from kvstore_kernels.cuda.pages import PAGE_TOKENS, DeviceExpansion, SignPages, on_device
from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import Expansion

WARPS = 8
BLOCKS = 2
"""A multiprocessor holds; a split is as long as it takes to give each block one."""
RING_BYTES = 8 * 1024
"""A warp's ring of pieces."""
TILE_ROWS = 4
ROW_TILES = (1, 2, 4, 8)
"""That one block may take."""
LOG2_E = 1 / log(2)
ALIGNMENT = 8
"""Rows of `out` begin at multiples of this many numbers."""


def row_tiles(rows: int) -> int:
    """Tiles of four query rows that one block takes."""
    return next((tiles for tiles in ROW_TILES if rows <= TILE_ROWS * tiles), ROW_TILES[-1])


def macros(
    expansion: Expansion, unit_count: int, rows: int, soft_cap: bool, dtype: torch.dtype, *, maxima: bool = False
) -> build.Macros:
    return {
        "UNITS": unit_count,
        "PLANES": expansion.query_bits,
        "KEY_GROUPS": expansion.layout.groups,
        "KEY_OFFSETS": int(expansion.layout.has_offsets),
        "SOFT_CAP": int(soft_cap),
        "ROW_TILES": row_tiles(rows),
        "OUT_HALF": int(dtype == torch.float16),
        "MAXIMA": int(maxima),
    }


def variants(
    expansion: Expansion, dtype: torch.dtype = torch.float32, *, soft_cap: bool = False
) -> Iterator[build.Variant]:
    """For any number of query rows."""
    units = on_device(expansion, torch.device("cpu")).units.shape[1]
    for tiles in ROW_TILES:
        for maxima in (False, True):
            m = macros(expansion, units, TILE_ROWS * tiles, soft_cap, dtype, maxima=maxima)
            yield "score", m, shared_bytes(m)


def shared_bytes(m: build.Macros) -> int:
    """What score.cu lays out."""
    rows = TILE_ROWS * m["ROW_TILES"]
    constants = rows * (1 + 4 * m["KEY_GROUPS"]) * 4
    scales = m["KEY_GROUPS"] * (1 + m["KEY_OFFSETS"]) * 512
    planes = m["ROW_TILES"] * m["UNITS"] * m["PLANES"] // 2 * 256
    return planes + -(-constants // 16) * 16 + rows * 4 + WARPS * (RING_BYTES + 2 * scales)


def split_pages(pages: int, heads: int, device: torch.device, *, multiple: int = WARPS) -> int:
    """Pages a split, at least one a warp: fixed by how many there are, never by what else runs."""
    splits = BLOCKS * build.multiprocessors(device)
    return max(WARPS, -(-pages * heads // (splits * multiple)) * multiple)


def score(
    q: Tensor, keys: SignPages, *, sm_scale: float, logit_soft_cap: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits [T, Hq, end - first] in `dtype` (float32 or float16) of q [T, Hq, D]; the cap is applied."""
    return _scored(q, keys, None, sm_scale, logit_soft_cap, dtype)[0]


def score_with_maxima(
    q: Tensor, keys: SignPages, group_tokens: int, *, sm_scale: float, logit_soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Logits float32, and key.cuh's keys int32 [T, Hq, groups] of the largest of each `group_tokens`: 64, 128 or 256.

    Groups begin at the first token's page; 0 is the key of one that holds none of the tokens.
    """
    scores, maxima = _scored(q, keys, group_tokens, sm_scale, logit_soft_cap, torch.float32)
    assert maxima is not None
    return scores, maxima


def _scored(
    q: Tensor, keys: SignPages, group_tokens: int | None, sm_scale: float, soft_cap: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    expansion, pages = keys.expansion, keys.pages
    heads = expansion.layout.heads
    group = query_group(q, heads, expansion.layout.head_dim)
    rows = q.shape[0] * group
    page_first, page_end = pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS)
    origin = page_first * PAGE_TOKENS
    stride = -(-(pages.end - origin) // ALIGNMENT) * ALIGNMENT
    out = torch.empty(q.shape[0], q.shape[1], stride, dtype=dtype, device=q.device)
    maxima = None
    if group_tokens is not None:
        groups = (page_end - page_first) * (PAGE_TOKENS // group_tokens)
        maxima = torch.empty(*q.shape[:2], groups, dtype=torch.int32, device=q.device)
    if rows and page_first < page_end:
        basis = on_device(expansion, q.device)
        y = expand(q, basis)
        _launch(out, maxima, y, keys, basis, rows, q.shape[1], group, sm_scale, soft_cap)
    return out[:, :, pages.first - origin : pages.end - origin], maxima


def _launch(
    out: Tensor,
    maxima: Tensor | None,
    y: Tensor,
    keys: SignPages,
    basis: DeviceExpansion,
    rows: int,
    query_heads: int,
    group: int,
    sm_scale: float,
    soft_cap: float,
) -> None:
    pages, heads = keys.pages, len(basis.matrix)
    page_first, page_end = pages.first // PAGE_TOKENS, -(-pages.end // PAGE_TOKENS)
    groups = 0 if maxima is None else maxima.shape[2]
    m = macros(keys.expansion, basis.units.shape[1], rows, bool(soft_cap), out.dtype, maxima=maxima is not None)
    split = split_pages(page_end - page_first, heads, out.device)
    grid = (-(-(page_end - page_first) // split), heads, -(-rows // (TILE_ROWS * m["ROW_TILES"])))
    shared = shared_bytes(m)
    build.kernel("score", out.device, m, shared).launch(
        grid, WARPS * 32, shared, pages.slab, pages.table, basis.heads, basis.units, y, out, page_first, page_end,
        split, pages.first, pages.end, page_first * PAGE_TOKENS, out.shape[2], rows, query_heads, group, basis.length,
        basis.width, 2 * sm_scale / soft_cap * LOG2_E if soft_cap else sm_scale, float(soft_cap), maxima, groups,
        (4 * (page_end - page_first) // max(groups, 1)).bit_length() - 1, follows=True,
    )  # fmt: skip
