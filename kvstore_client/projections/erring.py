"""Attention over one text whose stored keys and values come back with errors, differentiable in the errors."""

import torch
from torch import Tensor

from kvstore_client.projections.attention import LayerCall, stored_mask


def erring(call: LayerCall, keys: Tensor, values: Tensor) -> Tensor:
    """Attention output [Hq, T, D] where stored tokens are read with these errors [H, T, D] added, others exactly."""
    stored = stored_mask(call.q.shape[1], call.q.device)
    q = call.q.unflatten(0, (-1, call.group))
    k, v, k_error, v_error = (x.unsqueeze(1) for x in (call.k, call.v, keys, values))
    logits = (q @ k.mT + (q @ k_error.mT) * stored) * call.sm_scale
    weights = torch.softmax(logits + torch.full_like(logits[0, 0], -torch.inf).triu(1), -1)
    return (weights @ v + (weights * stored) @ v_error).flatten(0, 1)
