"""Estimated attention logits of stored rows."""

import torch
from torch import Tensor

from kvstore_kernels.packing import signs_of
from kvstore_kernels.reference.expand import HeadQueries, expand, rows_by_group
from kvstore_kernels.shapes import heads_of, query_group, tokens_of
from kvstore_kernels.types import DenseRows, Expansion, Rows, SignRows


def score(q: Tensor, keys: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0) -> Tensor:
    """Logits float32 [T, Hq, N] of q [T, Hq, D]: <q, k^> sm_scale, then cap * tanh(logit / cap) if there is a cap."""
    return logits(q, keys, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap)


def logits(q: Tensor, keys: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0, debias: float = 0.0) -> Tensor:
    """`score`, with the share `debias` of half of each key's variance taken off before the cap."""
    tokens, (heads, head_dim) = tokens_of(keys), heads_of(keys)
    group = query_group(q, heads, head_dim)
    by_head = (
        _sign_logits(q, keys, sm_scale, debias) if isinstance(keys, SignRows) else _dense_logits(q, keys, sm_scale)
    )
    out = torch.stack(by_head).view(heads, q.shape[0], group, tokens).transpose(0, 1).flatten(1, 2)
    return logit_soft_cap * torch.tanh(out / logit_soft_cap) if logit_soft_cap else out


def alphas(expansion: Expansion, scales: Tensor, head: int) -> Tensor:
    """float32 [N, G]; no columns where the head stores no words."""
    start, end = expansion.layout.scale_starts[head : head + 2]
    return scales[:, start : min(end, start + expansion.layout.groups)].float()


def betas(expansion: Expansion, scales: Tensor, head: int) -> Tensor:
    """float32 [N, G]; no columns where the head stores no offsets."""
    start, end = expansion.layout.scale_starts[head : head + 2]
    return scales[:, min(end, start + expansion.layout.groups) : end].float()


def head_signs(rows: SignRows, head: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """t [N, m] of the rows that the expansion reads."""
    start = rows.expansion.layout.word_starts[head]
    return signs_of(rows.signs.words[:, start : start + rows.expansion.read_words(head)], dtype)


def _dense_logits(q: Tensor, keys: DenseRows, sm_scale: float) -> list[Tensor]:
    """[R, N] of each KV head."""
    rows = q.double().unflatten(1, (keys.data.shape[1], -1))
    return [
        (rows[:, head].flatten(0, 1) @ keys.data[:, head].double().T).float() * sm_scale
        for head in range(rows.shape[1])
    ]


def _sign_logits(q: Tensor, keys: SignRows, sm_scale: float, debias: float) -> list[Tensor]:
    """[R, N] of each KV head."""
    out = []
    for head, queries in enumerate(expand(q, keys.expansion)):
        scores = _sign_scores(queries, keys, head) * sm_scale
        if debias:
            scores -= (debias / 2 * sm_scale**2) * _variances(queries, keys, head)
        out.append(scores)
    return out


def _sign_scores(queries: HeadQueries, keys: SignRows, head: int) -> Tensor:
    """[R, N]. Integer dots are below 2^24, so float32 holds them and every partial sum exactly."""
    scores = queries.mean.unsqueeze(1).repeat(1, tokens_of(keys))
    signs = head_signs(keys, head)
    for rows, alpha in zip(
        rows_by_group(keys.expansion, head), alphas(keys.expansion, keys.signs.scales, head).T, strict=True
    ):
        dots = queries.ints[:, rows] @ signs[:, rows].T
        scores += (alpha * queries.step.unsqueeze(1)) * dots
    for beta, along in zip(betas(keys.expansion, keys.signs.scales, head).T, queries.offsets.T, strict=True):
        scores += beta * along.unsqueeze(1)
    return scores


def _variances(queries: HeadQueries, keys: SignRows, head: int) -> Tensor:
    """[R, N]."""
    variances = torch.zeros(len(queries.step), tokens_of(keys))
    for alpha, noise in zip(alphas(keys.expansion, keys.signs.scales, head).T, queries.noise.T, strict=False):
        variances += alpha.square() * noise.unsqueeze(1)
    return variances
