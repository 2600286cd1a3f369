"""Logits of a few chosen tokens of sign sketches on device pages: of no other token are bits read.

Few numbers of many places, so torch gathers them: the words of one token and head lie together, eight at a time.
"""

import torch
from torch import Tensor

from kvstore_kernels.cuda.expand import expand
from kvstore_kernels.cuda.pages import PAGE_TOKENS, PAGE_UNIT, UNIT_WORDS, DeviceExpansion, SignPages, on_device
from kvstore_kernels.packing import signs_of
from kvstore_kernels.reference.expand import SMALLEST_STEP
from kvstore_kernels.shapes import query_group

WORDS_MOST = 1 << 20
"""That are unpacked at a time, to 128 bytes each."""


def score_at(q: Tensor, keys: SignPages, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """Logits float32 [T, Hq, C] of q [T, Hq, D] and the tokens positions int64 [T, Hq, C], counted from the pages' first.

    As `score` has them: the integers of a query and their sums are the same.
    """
    layout, basis = keys.expansion.layout, on_device(keys.expansion, q.device)
    group = query_group(q, layout.heads, layout.head_dim)
    y = expand(q, basis)
    by_head = positions.unflatten(1, (layout.heads, group)).transpose(0, 1).flatten(1, 2)
    step = max(1, WORDS_MOST // max(1, by_head.shape[0] * by_head.shape[1] * basis.words))
    parts = [_scores(y, keys, basis, part) for part in by_head.split(step, 2)]
    logits = torch.cat(parts, 2).unflatten(1, (q.shape[0], group)).transpose(0, 1).flatten(1, 2) * sm_scale
    return logit_soft_cap * torch.tanh(logits / logit_soft_cap) if logit_soft_cap else logits


def _scores(y: Tensor, keys: SignPages, basis: DeviceExpansion, positions: Tensor) -> Tensor:
    """float32 [H, R, C] of y [H, R, length] and positions [H, R, C]."""
    layout, width = keys.expansion.layout, basis.width
    step = y[..., :width].abs().amax(2, keepdim=True) / (2 ** (keys.expansion.query_bits - 1) - 1)
    usable = step >= SMALLEST_STEP
    ints = torch.round(y[..., :width] / torch.where(usable, step, 1.0)) * usable
    tokens = keys.pages.first + positions
    units, row = keys.pages.table[tokens // PAGE_TOKENS].long(), tokens % PAGE_TOKENS
    dots = (signs_of(_words(keys, basis, units, row)).mul_(ints.unsqueeze(2))).unflatten(3, (-1, 32)).sum(4)
    scores = y[..., width : width + 1].expand(positions.shape)
    for group in range(layout.groups):
        own = (basis.groups == group)[:, None, None]
        alpha = _scale(keys, basis, units, row, group)
        scores = scores + alpha * (step * usable) * (dots * own).sum(3)  # whole numbers below 2^24: exact in any order
        if layout.has_offsets:
            beta = _scale(keys, basis, units, row, layout.groups + group)
            scores = scores + beta * y[..., width + 1 + group : width + 2 + group]
    return scores


def _words(keys: SignPages, basis: DeviceExpansion, units: Tensor, row: Tensor) -> Tensor:
    """int32 [H, R, C, W] of rows of pages that begin at `units` (logits.cuh); any bits where a head reads fewer."""
    word = torch.arange(basis.groups.shape[1], device=row.device)
    first_word, _, read, stored = (column[:, None] for column in basis.heads.long().unbind(1))
    word = word.minimum((read - 1).clamp(min=0))  # [H, W]
    block = word // UNIT_WORDS * UNIT_WORDS
    count = (stored - block).clamp(1, UNIT_WORDS)
    chunk, g, token = row // 32, row % 32 // 4, row % 4
    order = torch.tensor([[0, 2, 1, 3], [2, 0, 3, 1]], device=row.device)[g // 2 % 2, token]
    in_word = (4 * g + order).unsqueeze(3)
    in_block = chunk.unsqueeze(3) * count[:, None, None] + (word - block)[:, None, None]
    place = units.unsqueeze(3) * (PAGE_UNIT // 4) + ((first_word + block) * PAGE_TOKENS)[:, None, None]
    place = torch.where((stored > 0)[:, None, None], place + in_block * 32 + in_word, 0)
    return _as(keys.pages.slab, torch.int32)[place]


def _scale(keys: SignPages, basis: DeviceExpansion, units: Tensor, row: Tensor, number: int) -> Tensor:
    """float32 [H, R, C]: a scale of each token, 0 of heads that store none."""
    _, first, _, stored = (column[:, None, None] for column in basis.heads.long().unbind(1))
    place = torch.where(stored > 0, (units + first + number) * PAGE_TOKENS + row, 0)
    return torch.where(stored > 0, _as(keys.pages.slab, torch.float16)[place].float(), 0.0)


def _as(slab: Tensor, dtype: torch.dtype) -> Tensor:
    return slab[: len(slab) // PAGE_UNIT * PAGE_UNIT].view(dtype)
