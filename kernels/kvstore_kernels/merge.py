"""Partial attention results over disjoint key sets, merged into the result over their union."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merges (out [..., D] normalised over its own keys, natural-log lse [...]) pairs; float32 inside and out.

    An empty state is (anything finite, -inf), or +inf as some kernels write it; all empty gives (0, -inf).
    """
    outs = torch.stack([out.float() for out, _ in states])
    lses = torch.stack([lse.float() for _, lse in states])
    lses = torch.where(lses == torch.inf, -torch.inf, lses)
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - torch.where(lse == -torch.inf, 0.0, lse))
    return (weights.unsqueeze(-1) * outs).sum(0), lse
