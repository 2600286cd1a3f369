"""How far estimated logits are from exact ones: what every answer says of itself."""

from itertools import pairwise

import torch
from torch import Tensor

from kvstore_kernels.shapes import query_group
from kvstore_kernels.types import Expansion, SignLayout


def alpha_columns(layout: SignLayout) -> Tensor:
    """int64 [H, G]: where each head's alphas lie in a token's scales; -1 for a head that stores nothing."""
    columns = torch.full((layout.heads, layout.groups), -1, dtype=torch.int64)
    for head, (start, end) in enumerate(pairwise(layout.scale_starts)):
        if end > start:
            columns[head] = torch.arange(start, start + layout.groups)
    return columns


def sum_of_squares(scales: Tensor, columns: Tensor) -> Tensor:
    """float64 [H, G]: sums of alpha^2 over the tokens of scales [N, S]; 0 where there are no columns."""
    sums = torch.cat([scales.double().square().sum(0), scales.new_zeros(1, dtype=torch.float64)])
    return sums[columns]


def score_variance(q: Tensor, expansion: Expansion, mean_squares: Tensor) -> Tensor:
    """float32 [T, Hq] for q [T, Hq, D]: sum_g mean(alpha_g^2) N_g(q), the mean being over stored tokens.

    `mean_squares` is float64 [H, G]. The variance of a logit is this times sm_scale^2. N_g(q) = q^T noise_form q, so a
    query is not expanded for it.
    """
    heads, head_dim = expansion.layout.heads, expansion.layout.head_dim
    group = query_group(q, heads, head_dim)
    rows = q.float().unflatten(1, (heads, group)).transpose(0, 1).flatten(1, 2)  # [H, R, D]
    out = torch.zeros(heads, rows.shape[1])
    for form, squares in zip(expansion.noise_form.unbind(1), mean_squares.float().unbind(1), strict=True):
        out += squares.unsqueeze(1) * torch.einsum("hrd,hrd->hr", rows @ form, rows)
    return out.unflatten(1, (q.shape[0], group)).transpose(0, 1).flatten(1, 2)
