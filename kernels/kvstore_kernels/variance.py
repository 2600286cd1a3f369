"""How far estimated logits are from exact ones: what every answer says of itself."""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ScoreNoise:
    """Of logits over certain stored tokens: q^T form q for any query q, or factor |q|^2 where the form is so simple."""

    form: Tensor
    """float32 [H, D, D], or the factor [H]."""

    def variance(self, q: Tensor) -> Tensor:
        """float32 [T, Hq] of q [T, Hq, D]; times sm_scale^2 it is the variance of a logit."""
        heads = len(self.form)
        rows = q.float().unflatten(1, (heads, query_group(q, heads, q.shape[2])))
        if self.form.dim() == 1:
            return (rows.square().sum(3) * self.form.unsqueeze(1)).flatten(1)
        return torch.einsum("thrd,hde,thre->thr", rows, self.form, rows).flatten(1)


def score_noise(expansion: Expansion, mean_squares: Tensor) -> ScoreNoise:
    """sum_g mean(alpha_g^2) N_g(q), where N_g(q) = q^T noise_form q: a query is not expanded for it.

    `mean_squares` float64 [H, G] are the means over the stored tokens.
    """
    weights = mean_squares.float()
    if (factor := expansion.noise_factor) is not None:
        return ScoreNoise((factor * weights).sum(1))
    return ScoreNoise((expansion.noise_form * weights[..., None, None]).sum(1))


def mean_noise(parts: Sequence[tuple[int, ScoreNoise]]) -> ScoreNoise:
    """Of logits over the tokens of all of at least one part, which has so many."""
    if len(parts) == 1:
        return parts[0][1]
    total = sum(tokens for tokens, _ in parts)
    forms = [noise.form * (tokens / total) for tokens, noise in parts]
    if any(form.dim() == 3 for form in forms):
        identity = torch.eye(next(form.shape[2] for form in forms if form.dim() == 3))
        forms = [form if form.dim() == 3 else form[:, None, None] * identity for form in forms]
    return ScoreNoise(torch.stack(forms).sum(0))


def score_variance(q: Tensor, expansion: Expansion, mean_squares: Tensor) -> Tensor:
    """float32 [T, Hq] for q [T, Hq, D]: see ScoreNoise."""
    return score_noise(expansion, mean_squares).variance(q)
