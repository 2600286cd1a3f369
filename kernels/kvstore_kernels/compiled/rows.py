"""Stored rows as the arrays that kernels read."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.types import SignRows

Floats = NDArray[np.float32]


class DenseBlocks:
    """Any float dtype [N, H, D], read as float32."""

    def __init__(self, data: Tensor) -> None:
        self._widen = {torch.bfloat16: _widen_bfloat16, torch.float16: _widen_float16}.get(data.dtype)
        data = data.detach()
        self._data = data.float().numpy() if self._widen is None else data.view(torch.int16).numpy()

    def read(self, tokens: slice) -> Floats:
        """[n, H, D]: a view where the dtype is float32."""
        block = self._data[tokens]
        if self._widen is None:
            return block
        out = np.empty(block.shape, np.float32)
        self._widen(block, out.view(np.int32), out)
        return out


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


@kernel
def _widen_bfloat16(block, bits, out):
    """`bits` is `out` seen as int32."""
    for token in range(block.shape[0]):
        for head in range(block.shape[1]):
            for channel in range(block.shape[2]):
                bits[token, head, channel] = np.int32(block[token, head, channel]) << 16


@kernel
def _widen_float16(block, bits, out):
    """`bits` is `out` seen as int32. Moved into place, the exponent is 112 too small; NaN and Inf become Inf."""
    for token in range(block.shape[0]):
        for head in range(block.shape[1]):
            for channel in range(block.shape[2]):
                half = np.int32(block[token, head, channel])
                bits[token, head, channel] = (half & np.int32(-0x80000000)) | ((half & 0x7FFF) << 13)
            for channel in range(block.shape[2]):
                value = out[token, head, channel] * np.float32(2.0**112)
                out[token, head, channel] = value if abs(value) < 65536 else value * np.float32(np.inf)
