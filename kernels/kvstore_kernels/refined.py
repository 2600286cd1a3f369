"""Coarse to fine: a prefix of every token's bits, and all bits of the tokens that look best by it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore_kernels.merge import merge_states
from kvstore_kernels.shapes import check_pair, heads_of, query_group
from kvstore_kernels.types import DenseRows, Rows, SignRows, Signs

LOGITS_MAX = 1 << 26
"""Of one pass over all tokens, unless one query token has more."""


@dataclass(frozen=True)
class Ops:
    """What coarse-to-fine is made of: `logits` and `weigh` of the reference, or its twins, and `topk`."""

    logits: Callable[..., Tensor]
    topk: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    weigh: Callable[[Tensor, Rows], tuple[Tensor, Tensor]]


def score_at(
    ops: Ops, q: Tensor, keys: Rows, positions: Tensor, *, sm_scale: float, logit_soft_cap: float = 0.0
) -> Tensor:
    """Logits float32 [T, Hq, C] of `score` at positions [T, Hq, C]: no other rows are read."""
    query_group(q, *heads_of(keys))
    out = torch.empty(positions.shape)
    for head in _heads(q, keys, positions):
        rows = one_head(keys, head.number, head.tokens)
        logits = ops.logits(head.q, rows, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)
        out[:, head.query_heads] = logits.gather(2, head.places)
    return out


def attend_refined(
    ops: Ops,
    q: Tensor,
    coarse: tuple[Rows, Rows],
    fine: tuple[Rows, Rows],
    best: int,
    *,
    sm_scale: float,
    logit_soft_cap: float,
    debias: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens of `coarse` and `fine`, keys and values of the same sketches at two levels.

    The `best` tokens of each query row and head by their coarse logits are read from `fine`, all others from `coarse`.
    """
    how = {"sm_scale": sm_scale, "logit_soft_cap": logit_soft_cap, "debias": debias}
    tokens = check_pair(*coarse)
    query_group(q, *heads_of(coarse[0]))
    outs, lses = torch.empty(q.shape), torch.empty(q.shape[:2])
    step = max(1, LOGITS_MAX // max(1, q.shape[1] * tokens))
    for start in range(0, len(q), step):
        part = slice(start, start + step)
        logits = ops.logits(q[part], coarse[0], **how)
        positions = ops.topk(logits, best)[0]
        rest = ops.weigh(logits.scatter_(2, positions, -torch.inf), coarse[1])
        out, lse = torch.empty(q[part].shape), torch.empty(logits.shape[:2])
        for head in _heads(q[part], fine[0], positions):
            seen = ops.logits(head.q, one_head(fine[0], head.number, head.tokens), **how)
            own = torch.full_like(seen, -torch.inf).scatter_(2, head.places, seen.gather(2, head.places))
            values = one_head(fine[1], head.number, head.tokens)
            out[:, head.query_heads], lse[:, head.query_heads] = ops.weigh(own, values)
        outs[part], lses[part] = merge_states([rest, (out, lse)])
    return outs, lses


def one_head(rows: Rows, head: int, tokens: Tensor) -> Rows:
    """Rows of the tokens [n] of one KV head: no others are read."""
    if isinstance(rows, DenseRows):
        return DenseRows(rows.data[tokens, head : head + 1])
    assert isinstance(rows, SignRows)
    layout = rows.expansion.layout
    words, scales = (slice(*starts[head : head + 2]) for starts in (layout.word_starts, layout.scale_starts))
    return SignRows(
        Signs(rows.signs.words[tokens, words], rows.signs.scales[tokens, scales]), rows.expansion.by_head[head]
    )


@dataclass(frozen=True)
class _Head:
    """One KV head: its query heads' rows q [T, Hq / H, D], the tokens [n] they ask for and where each is among them."""

    number: int
    query_heads: slice
    q: Tensor
    tokens: Tensor
    places: Tensor


def _heads(q: Tensor, keys: Rows, positions: Tensor) -> Iterator[_Head]:
    heads, _ = heads_of(keys)
    group = q.shape[1] // heads
    for number in range(heads):
        own = slice(number * group, (number + 1) * group)
        tokens, places = positions[:, own].unique(return_inverse=True)
        yield _Head(number, own, q[:, own], tokens, places)
