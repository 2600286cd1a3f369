"""Logits of, and attention over, rows kept as numbers on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.expand import QUERY_DTYPES
from kvstore_kernels.cuda.score import LOG2_E
from kvstore_kernels.shapes import query_group

SCORE_WARPS = 4
WARPS = 8
TILE_TOKENS = 32
SPLITS_MOST = 128
ROWS_MOST = 4
"""Query rows of a block."""
ALIGNMENT = 16
"""Bytes of one load."""


def macros(q: torch.dtype, keys: torch.dtype, head_dim: int, rows: int, *, soft_cap: bool) -> build.Macros:
    for dtype in (q, keys):
        if dtype not in QUERY_DTYPES:
            raise ValueError(f"dtype {dtype} is none of {', '.join(map(str, QUERY_DTYPES))}")
    if head_dim % 32 or not 32 <= head_dim <= 256:
        raise ValueError(f"head_dim is {head_dim}, no multiple of 32 in [32, 256]")
    return {
        "HEAD_DIM": head_dim,
        "QUERY": QUERY_DTYPES[q],
        "KEYS": QUERY_DTYPES[keys],
        "ROWS": next((some for some in (1, 2) if rows <= some), ROWS_MOST),
        "SOFT_CAP": int(soft_cap),
    }


def variants(head_dim: int, dtype: torch.dtype) -> Iterator[build.Variant]:
    """For rows of `dtype`, queries of it or of float32, without a soft cap."""
    for q in dict.fromkeys((dtype, torch.float32)):
        for rows in (1, 2, ROWS_MOST):
            m = macros(q, dtype, head_dim, rows, soft_cap=False)
            yield "dense_score", m, 0
            yield "dense_attend", {**m, "VALUES": m["KEYS"]}, shared_bytes(m)
    yield "dense_merge", {"HEAD_DIM": head_dim}, 0


def shared_bytes(m: build.Macros) -> int:
    """What dense_attend.cu lays out."""
    return 4 * m["ROWS"] * max(WARPS * m["HEAD_DIM"], m["HEAD_DIM"] + WARPS * TILE_TOKENS)


def score(q: Tensor, keys: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """Logits float32 [T, Hq, N] of q [T, Hq, D] and keys [N, H, D], with the soft cap applied."""
    tokens, heads, head_dim = keys.shape
    group = query_group(q, heads, head_dim)
    rows = q.shape[0] * group
    out = torch.empty(*q.shape[:2], tokens, dtype=torch.float32, device=q.device)
    if out.numel():
        m = macros(q.dtype, keys.dtype, head_dim, rows, soft_cap=bool(logit_soft_cap))
        split = split_tokens(tokens, SCORE_WARPS)
        build.kernel("dense_score", q.device, m).launch(
            (-(-tokens // split) * -(-rows // m["ROWS"]), heads, 1), SCORE_WARPS * 32, 0, _whole(q), _whole(keys), out,
            tokens, split, rows, q.shape[1], group, sm_scale / (logit_soft_cap or 1.0), float(logit_soft_cap),
        )  # fmt: skip
    return out


def attend(
    q: Tensor, keys: Tensor, values: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Out float32 [T, Hq, D] and natural-log lse float32 [T, Hq] of q [T, Hq, D] over keys and values [N, H, D].

    No tokens give (0, -inf).
    """
    if keys.shape != values.shape:
        raise ValueError(f"keys have shape {[*keys.shape]}, values {[*values.shape]}")
    tokens, heads, head_dim = keys.shape
    group = query_group(q, heads, head_dim)
    rows = q.shape[0] * group
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not tokens or not rows:
        return out.zero_(), lse.fill_(-torch.inf)
    m = macros(q.dtype, keys.dtype, head_dim, rows, soft_cap=bool(logit_soft_cap))
    m["VALUES"] = macros(q.dtype, values.dtype, head_dim, rows, soft_cap=False)["KEYS"]
    split, shared = split_tokens(tokens, WARPS), shared_bytes(m)
    splits = -(-tokens // split)
    partials = torch.empty(heads, splits, rows, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads, splits, rows, 2, dtype=torch.float32, device=q.device)
    # Without a cap logits come in powers of two; with one, first as multiples of the cap.
    unit, cap = (sm_scale / logit_soft_cap, logit_soft_cap * LOG2_E) if logit_soft_cap else (sm_scale * LOG2_E, 0.0)
    build.kernel("dense_attend", q.device, m, shared).launch(
        (splits * -(-rows // m["ROWS"]), heads, 1), WARPS * 32, shared, _whole(q), _whole(keys), _whole(values),
        partials, sums, tokens, split, rows, q.shape[1], group, unit, cap,
    )  # fmt: skip
    build.kernel("dense_merge", q.device, {"HEAD_DIM": head_dim}).launch(
        (rows, heads, 1), WARPS * 32, 0, partials, sums, out, lse, splits, q.shape[1], group, follows=True
    )
    return out, lse


def split_tokens(tokens: int, warps: int) -> int:
    """Tokens of one split, fixed by how many there are: whole rounds of a block of `warps`."""
    round_tokens = warps * TILE_TOKENS
    return round_tokens * -(-tokens // (round_tokens * SPLITS_MOST))


def _whole(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
