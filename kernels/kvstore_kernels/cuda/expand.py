"""The query side of every sign codec: y = E q in float64, rounded once."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.pages import DeviceExpansion
from kvstore_kernels.shapes import query_group

BLOCK_ROWS = 16
BLOCK_QUERIES = 8
QUERY_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def macros(head_dim: int, dtype: torch.dtype) -> build.Macros:
    if dtype not in QUERY_DTYPES:
        raise ValueError(f"q is {dtype}, which is none of {', '.join(map(str, QUERY_DTYPES))}")
    return {"HEAD_DIM": head_dim, "QUERY": QUERY_DTYPES[dtype]}


def variants(head_dim: int) -> Iterator[build.Variant]:
    for dtype in QUERY_DTYPES:
        yield "expand", macros(head_dim, dtype), 0


def expand(q: Tensor, basis: DeviceExpansion) -> Tensor:
    """y float32 [H, R, basis.length] of q [T, Hq, D]: every row of each head's matrix against its R = T Hq / H rows."""
    heads, _, head_dim = basis.matrix.shape
    group = query_group(q, heads, head_dim)
    rows = q.shape[0] * group
    y = torch.empty(heads, rows, basis.length, dtype=torch.float32, device=q.device)
    grid = (-(-basis.length // BLOCK_ROWS), heads, -(-rows // BLOCK_QUERIES))
    build.kernel("expand", q.device, macros(head_dim, q.dtype)).launch(
        grid, 64, 0, q.contiguous(), basis.matrix, y, basis.length, rows, q.shape[1], group
    )
    return y
