"""Sign rows to words and back: bit j of word w is row 32 w + j, as `types` says."""

import numpy as np
import torch
from torch import Tensor


def pack_rows(bits: Tensor) -> Tensor:
    """Words int32 [..., m / 32] of rows [..., m], bool or uint8, where anything but 0 is t = +1."""
    if bits.is_cuda:
        words = (bits.bool().unflatten(-1, (-1, 32)).long() << torch.arange(32, device=bits.device)).sum(-1)
        return torch.where(words < 2**31, words, words - 2**32).int()
    packed = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view("<i4"))


def unpack_rows(words: Tensor) -> Tensor:
    """Rows uint8 [..., 32 W], 1 for t = +1 and 0 for t = -1, of words int32 [..., W]."""
    if words.is_cuda:
        return (words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1).to(torch.uint8).flatten(-2)
    return torch.from_numpy(np.unpackbits(words.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little"))


def signs_of(words: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """t [..., 32 W], -1 or +1 in `dtype`, of words int32 [..., W]."""
    return unpack_rows(words).to(dtype).mul_(2).sub_(1)
