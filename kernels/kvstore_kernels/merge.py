"""Partial attention results over disjoint key sets, merged into the result over their union."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merges (out [..., D] normalised over its own keys, natural-log lse [...]) pairs; float32 inside and out.

    An empty state is (anything finite, -inf), or +inf as some kernels write it; all empty gives (0, -inf).
    """
    lses = torch.stack([lse.float() for _, lse in states])
    lses = torch.where(lses == torch.inf, -torch.inf, lses)
    best = lses.amax(0)
    weights = torch.exp(lses - torch.where(best == -torch.inf, 0.0, best))
    total = weights.sum(0)
    # Divided by the sum of the very weights used: exact at any size of lse, which float32 rounds coarsely.
    outs = torch.stack([out.float() for out, _ in states])
    out = (weights.unsqueeze(-1) * outs).sum(0) / torch.where(total == 0, 1.0, total).unsqueeze(-1)
    return out, best + torch.log(total)
