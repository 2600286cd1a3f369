"""The best tokens of each query head, from scores on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvstore_kernels import build
from kvstore_kernels.cuda.pages import PAGE_TOKENS, SignPages
from kvstore_kernels.cuda.score import score_with_maxima

K_MOST = 4096
CANDIDATES = 8192
"""That a block sorts; a row that has no more is one pass."""
CHUNK = 8
BLOCK_CHUNKS = 1024
LANES_MOST = PAGE_TOKENS // CHUNK
SCORED_LANES = 8
"""At least, of groups whose maxima score.cu finds."""
GROUPS = 8
"""For each score that is wanted; one of them is read again."""
SHARED_BYTES = 8 * CANDIDATES + 4 * K_MOST + 4 * 256 + 16


def macros(dtype: torch.dtype) -> build.Macros:
    return {"HALF": int(dtype == torch.float16)}


def variants() -> Iterator[build.Variant]:
    for dtype in (torch.float32, torch.float16):
        yield "topk_maxima", macros(dtype), 0
        yield "topk", macros(dtype), SHARED_BYTES


def group_lanes(tokens: int, k: int, least: int = 1) -> int:
    """Chunks of scores in one group: as many as leave 8 k groups, a power of two; 0 to read every chunk."""
    lanes = LANES_MOST
    while lanes > least and tokens < GROUPS * k * lanes * CHUNK:
        lanes //= 2
    return lanes if tokens > CANDIDATES and tokens >= 2 * k * lanes * CHUNK else 0


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions int64 and scores float32 [T, Hq, min(k, N)] of scores [T, Hq, N], best first, ties lower position.

    `scores` is float32 or float16, strided as it comes, but for the last dimension; k is at most 4096.
    """
    if scores.dim() != 3 or scores.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"scores are {scores.dtype} {[*scores.shape]} instead of float32 or float16 [T, Hq, N]")
    _check_k(k)
    if scores.stride(2) != 1:
        scores = scores.contiguous()
    rows, tokens = scores.shape[0] * scores.shape[1], scores.shape[2]
    lanes = group_lanes(tokens, k)
    if not lanes or not rows:
        return _choose(scores, k)
    groups, blocks = (-(-(tokens + CHUNK) // (CHUNK * each)) for each in (lanes, BLOCK_CHUNKS))
    maxima = torch.empty(*scores.shape[:2], groups, dtype=torch.int32, device=scores.device)
    build.kernel("topk_maxima", scores.device, macros(scores.dtype)).launch(
        (rows * blocks, 1, 1), 256, 0, scores, maxima, scores.shape[1], scores.stride(0), scores.stride(1), tokens,
        groups, lanes, blocks, follows=True,
    )  # fmt: skip
    return _choose(scores, k, maxima, lanes)


def best(q: Tensor, keys: SignPages, k: int, *, sm_scale: float, logit_soft_cap: float = 0.0) -> tuple[Tensor, Tensor]:
    """`topk` of `score`: the score kernel finds the maxima of groups while it has the scores."""
    _check_k(k)
    pages = keys.pages
    lanes = group_lanes(pages.end - pages.first, k, SCORED_LANES)
    group_tokens = (lanes or LANES_MOST) * CHUNK
    scores, maxima = score_with_maxima(q, keys, group_tokens, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
    return _choose(scores, k, maxima if lanes else None, lanes, pages.first % PAGE_TOKENS if lanes else 0)


def _check_k(k: int) -> None:
    if not 0 <= k <= K_MOST:
        raise ValueError(f"k is {k}, not in [0, {K_MOST}]")


def _choose(
    scores: Tensor, k: int, maxima: Tensor | None = None, lanes: int = 0, margin: int = 0
) -> tuple[Tensor, Tensor]:
    """From the largest of each group of `lanes` chunks; chunks begin `margin` numbers before the scores."""
    kept = min(k, scores.shape[2])
    positions = torch.empty(*scores.shape[:2], kept, dtype=torch.int64, device=scores.device)
    best = torch.empty(positions.shape, dtype=torch.float32, device=scores.device)
    if positions.numel():
        build.kernel("topk", scores.device, macros(scores.dtype), SHARED_BYTES).launch(
            (scores.shape[0] * scores.shape[1], 1, 1), 1024, SHARED_BYTES, scores, maxima, positions, best,
            scores.shape[1], scores.stride(0), scores.stride(1), scores.shape[2],
            0 if maxima is None else maxima.shape[2], lanes, margin, kept,
            (1 << (margin + scores.shape[2] + CHUNK).bit_length()) - 1, follows=maxima is not None,
        )  # fmt: skip
    return positions, best
