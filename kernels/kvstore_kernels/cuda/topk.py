"""The best tokens of each query head, from scores on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels import build

K_MOST = 4096
CANDIDATES = 8192
"""That a block sorts; a row that has no more is one pass."""
CHUNK = 8
BLOCK_CHUNKS = 1024
LANES_MOST = 32
GROUPS = 8
"""For each score that is wanted; one of them is read again."""
SHARED_BYTES = 8 * CANDIDATES + 4 * K_MOST + 4 * 256 + 16


def macros(dtype: torch.dtype) -> build.Macros:
    return {"HALF": int(dtype == torch.float16)}


def variants() -> Iterator[build.Variant]:
    for dtype in (torch.float32, torch.float16):
        yield "topk_maxima", macros(dtype), 0
        yield "topk", macros(dtype), SHARED_BYTES


def group_lanes(tokens: int, k: int) -> int:
    """Chunks of scores in one group: as many as leave 8 k groups, a power of two; 0 to read every chunk."""
    lanes = LANES_MOST
    while lanes > 1 and tokens < GROUPS * k * lanes * CHUNK:
        lanes //= 2
    return lanes if tokens > CANDIDATES and tokens >= 2 * k * lanes * CHUNK else 0


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions int64 and scores float32 [T, Hq, min(k, N)] of scores [T, Hq, N], best first, ties lower position.

    `scores` is float32 or float16, strided as it comes, but for the last dimension; k is at most 4096.
    """
    if scores.dim() != 3 or scores.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scores are {scores.dtype} {[*scores.shape]} instead of float32 or float16 [T, Hq, N]")
    if not 0 <= k <= K_MOST:
        raise ValueError(f"k is {k}, not in [0, {K_MOST}]")
    if scores.stride(2) != 1:
        scores = scores.contiguous()
    rows, heads, tokens = scores.shape[0] * scores.shape[1], scores.shape[1], scores.shape[2]
    kept = min(k, tokens)
    positions = torch.empty(*scores.shape[:2], kept, dtype=torch.int64, device=scores.device)
    best = torch.empty(positions.shape, dtype=torch.float32, device=scores.device)
    if not positions.numel():
        return positions, best
    m, slots, lanes = macros(scores.dtype), tokens + CHUNK, group_lanes(tokens, kept)
    strides = scores.stride(0), scores.stride(1)
    maxima, groups = None, 0
    if lanes:
        groups = -(-slots // (CHUNK * lanes))
        blocks = -(-slots // (CHUNK * BLOCK_CHUNKS))
        maxima = torch.empty(rows, groups, dtype=torch.int32, device=scores.device)
        build.kernel("topk_maxima", scores.device, m).launch(
            (rows * blocks, 1, 1), 256, 0, scores, maxima, heads, *strides, tokens, groups, lanes, blocks,
            follows=True,
        )  # fmt: skip
    build.kernel("topk", scores.device, m, SHARED_BYTES).launch(
        (rows, 1, 1), 1024, SHARED_BYTES, scores, maxima, positions, best, heads, *strides, tokens, groups, lanes, kept,
        (1 << slots.bit_length()) - 1, follows=bool(lanes),
    )  # fmt: skip
    return positions, best
