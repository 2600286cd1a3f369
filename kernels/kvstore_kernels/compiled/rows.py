"""Stored rows as the arrays that kernels read."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.types import SignRows

Floats = NDArray[np.float32]


class DenseBlocks:
    """Any float dtype [N, H, D], read as float32."""

    def __init__(self, data: Tensor) -> None:
        self._bfloat16 = data.dtype == torch.bfloat16
        data = data.detach()
        self._data = data.view(torch.int16).numpy().view(np.uint16) if self._bfloat16 else data.numpy()

    def read(self, tokens: slice, head: int) -> Floats:
        """[n, D]."""
        block = self._data[tokens, head]
        if self._bfloat16:
            return (block.astype(np.uint32) << 16).view(np.float32)
        return block.astype(np.float32, copy=False)


class SignBlocks:
    """Words and scales of the heads of sign rows."""

    def __init__(self, rows: SignRows) -> None:
        self._layout, self._read_words = rows.expansion.layout, rows.expansion.read_words
        self._words, self._scales = rows.signs.words.numpy(), rows.signs.scales.numpy()

    def words(self, tokens: slice, head: int) -> NDArray[np.int32]:
        """[n, the words that the expansion reads]."""
        start = self._layout.word_starts[head]
        return self._words[tokens, start : start + self._read_words(head)]

    def scales(self, tokens: slice, head: int) -> tuple[Floats, Floats]:
        """Alphas and betas [G, n]; no rows where the head stores none."""
        start, end = self._layout.scale_starts[head : head + 2]
        both = np.ascontiguousarray(self._scales[tokens, start:end].T, dtype=np.float32)
        return both[: self._layout.groups], both[self._layout.groups :]
