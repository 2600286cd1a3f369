"""Attention over stored rows, whatever their kind, without their vectors being rebuilt."""

import torch
from torch import Tensor

from kvstore_kernels.reference.expand import rows_by_group
from kvstore_kernels.reference.score import alphas, betas, head_signs, logits
from kvstore_kernels.shapes import check_pair, heads_of
from kvstore_kernels.types import Rows, SignRows


def attend(
    q: Tensor, keys: Rows, values: Rows, *, sm_scale: float, logit_soft_cap: float = 0.0, debias: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Out float32 [T, Hq, D], normalised over these tokens, and natural-log lse float32 [T, Hq] of q [T, Hq, D].

    No tokens give (0, -inf). `debias` in [0, 1] takes that share of each key's variance / 2 off its logit before the
    cap; dense keys have none. Sums over tokens are in float64, so that no batch and no thread count shows in float32.
    """
    if check_pair(keys, values) == 0:
        return torch.zeros(*q.shape), torch.full(q.shape[:2], -torch.inf)
    return weigh(logits(q, keys, sm_scale=sm_scale, logit_soft_cap=logit_soft_cap, debias=debias), values)


def weigh(scores: Tensor, values: Rows) -> tuple[Tensor, Tensor]:
    """As `attend`, from logits [T, Hq, N]; -inf hides a token, and (0, -inf) comes of a row that sees none."""
    heads, head_dim = heads_of(values)
    best = scores.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.exp(scores - best)
    total = weights.double().sum(2)
    out = torch.empty(scores.shape[0], heads, scores.shape[1] // heads, head_dim)
    for head, rows in enumerate(weights.unflatten(1, (heads, -1)).unbind(1)):
        sums = _weighted_sum(rows.flatten(0, 1), values, head)
        own = total.unflatten(1, (heads, -1))[:, head].reshape(-1, 1)
        out[:, head] = (sums / torch.where(own == 0, 1.0, own)).unflatten(0, rows.shape[:2])
    return out.flatten(1, 2), (best.squeeze(2) + total.log()).float()


def _weighted_sum(weights: Tensor, values: Rows, head: int) -> Tensor:
    """sum_n weights_n v^_n float64 [R, D] of weights [R, N]."""
    if not isinstance(values, SignRows):
        return weights.double() @ values.data[:, head].double()
    expansion, scales = values.expansion, values.signs.scales
    out = weights.double().sum(1, keepdim=True) * expansion.mean[head].double()
    signs = head_signs(values, head, torch.float64)
    for rows, alpha in zip(rows_by_group(expansion, head), alphas(expansion, scales, head).T, strict=True):
        out += (weights * alpha).double() @ signs[:, rows] @ expansion.matrix[head][rows].double()
    if expansion.offset_basis is not None:
        for beta, basis in zip(betas(expansion, scales, head).T, expansion.offset_basis, strict=False):
            out += (weights * beta).double().sum(1, keepdim=True) * basis.double()
    return out
