"""Estimated logits of a few chosen tokens of sign sketches on device pages: of no other token are bits read."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.expand import expand
from kvstore_kernels.cuda.pages import SignPages, on_device
from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import WORD_ROWS, Expansion

CHOSEN = 64
"""Tokens of a block."""
THREADS = 256


def macros(expansion: Expansion, *, soft_cap: bool) -> build.Macros:
    return {
        "KEY_GROUPS": expansion.layout.groups,
        "KEY_OFFSETS": int(expansion.layout.has_offsets),
        "PLANES": expansion.query_bits,
        "SOFT_CAP": int(soft_cap),
    }


def variants(expansion: Expansion) -> Iterator[build.Variant]:
    width = on_device(expansion, torch.device("cpu")).width
    for soft_cap in (False, True):
        yield "score_at", macros(expansion, soft_cap=soft_cap), shared_bytes(width)


def shared_bytes(width: int) -> int:
    """What score_at.cu lays out."""
    return width // WORD_ROWS * (WORD_ROWS + 1) * 4


def score_at(q: Tensor, keys: SignPages, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """Logits float32 [T, Hq, C] of q [T, Hq, D] and the tokens positions int64 [T, Hq, C], from the pages' first on.

    As `score` has them: the integers of a query and their sums are the same.
    """
    expansion, pages = keys.expansion, keys.pages
    group = query_group(q, expansion.layout.heads, expansion.layout.head_dim)
    out = torch.empty(positions.shape, dtype=torch.float32, device=q.device)
    if out.numel():
        basis, shared = on_device(expansion, q.device), shared_bytes(on_device(expansion, q.device).width)
        y, cap = expand(q, basis), float(logit_soft_cap)
        kernel = build.kernel("score_at", q.device, macros(expansion, soft_cap=bool(cap)), shared)
        kernel.launch(
            (-(-positions.shape[2] // CHOSEN), y.shape[1], y.shape[0]), THREADS, shared, pages.slab, pages.table,
            basis.heads, basis.groups, y, positions.contiguous(), out, pages.first, positions.shape[2], q.shape[1],
            group, basis.length, basis.width, sm_scale / cap if cap else sm_scale, cap,
        )  # fmt: skip
    return out
