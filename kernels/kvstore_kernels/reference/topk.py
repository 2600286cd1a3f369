"""The best tokens of each query head."""

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


def topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions int64 and scores float32 [T, Hq, min(k, N)] of scores [T, Hq, N], best first, ties lower position.

    torch.topk leaves ties open, so it is asked for distinct keys: the score's bits, made to sort as the number does,
    above the position counted from the end.
    """
    scores = scores.float()
    bits = (scores + 0.0).view(torch.int32).long()  # -0.0 ties with 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (ordered << 32) + (LOW - torch.arange(scores.shape[-1]))
    best = torch.topk(keys, min(k, scores.shape[-1]), dim=-1).values
    positions = LOW - (best & LOW)
    return positions, scores.gather(-1, positions)
