"""Stored rows as the arrays that kernels read."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.types import WORD_ROWS, Expansion, SignLayout, SignRows

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class DenseArray:
    """[N, H, D] as float32, or as the int16 patterns of a narrower dtype, to be widened block by block."""

    data: NDArray
    bfloat16: bool

    @property
    def narrow(self) -> bool:
        return self.data.dtype == np.int16


def dense_array(data: Tensor) -> DenseArray:
    data = data.detach().contiguous()
    if data.dtype in (torch.bfloat16, torch.float16):
        return DenseArray(data.view(torch.int16).numpy(), data.dtype == torch.bfloat16)
    return DenseArray(data.float().numpy(), False)


@dataclass(frozen=True)
class Places:
    """Where an expansion finds its rows: the w words that it reads, by head and, in a head, by group."""

    columns: Ints  # [w], each word's place in a token's words
    rows: Ints  # [w], the first of the head's 32 rows that a word holds
    ends: Ints  # [H, G], where each group's words end in this list
    scale_starts: Ints  # [H + 1]


def places_of(expansion: Expansion) -> Places:
    layout = expansion.layout
    return _places(layout, tuple(expansion.read_words(head) for head in range(layout.heads)))


@lru_cache(256)
def _places(layout: SignLayout, read_words: tuple[int, ...]) -> Places:
    columns, rows, ends = [], [], []
    for head, (groups, count) in enumerate(zip(layout.word_groups, read_words, strict=True)):
        for group in range(layout.groups):
            chosen = np.flatnonzero(np.array(groups[:count]) == group)
            columns.extend(layout.word_starts[head] + chosen)
            rows.extend(WORD_ROWS * chosen)
            ends.append(len(columns))
    return Places(
        columns=np.array(columns, np.int64),
        rows=np.array(rows, np.int64),
        ends=np.array(ends, np.int64).reshape(layout.heads, layout.groups),
        scale_starts=np.array(layout.scale_starts, np.int64),
    )


def word_array(rows: SignRows) -> NDArray[np.int32]:
    """[N, W]."""
    return rows.signs.words.contiguous().numpy()


def scale_array(scales: Tensor) -> NDArray[np.int16]:
    """fp16 patterns [N, S]."""
    return scales.contiguous().view(torch.int16).numpy()


@kernel
def widen(block, bfloat16):
    """float32 of int16 patterns [n, a, b]. An fp16 exponent, moved into place, is 112 too small; NaN becomes Inf."""
    out = np.empty(block.shape, np.float32)
    bits = out.view(np.int32)
    for i in range(block.shape[0]):
        for j in range(block.shape[1]):
            if bfloat16:
                for k in range(block.shape[2]):
                    bits[i, j, k] = np.int32(block[i, j, k]) << 16
                continue
            for k in range(block.shape[2]):
                half = np.int32(block[i, j, k])
                bits[i, j, k] = (half & np.int32(-0x80000000)) | ((half & 0x7FFF) << 13)
            for k in range(block.shape[2]):
                value = out[i, j, k] * np.float32(2.0**112)
                out[i, j, k] = value if abs(value) < 65536 else value * np.float32(np.inf)
    return out


@kernel
def scale_lines(scales, start, end):
    """Columns [start, end) of finite scales [n, S] as float32 [end - start, n]."""
    out = np.empty((end - start, scales.shape[0]), np.float32)
    bits = out.view(np.int32)
    for line in range(end - start):
        for token in range(scales.shape[0]):
            half = np.int32(scales[token, start + line])
            bits[line, token] = (half & np.int32(-0x80000000)) | ((half & 0x7FFF) << 13)
        for token in range(scales.shape[0]):
            out[line, token] *= np.float32(2.0**112)
    return out


@kernel
def word_lines(words, columns):
    """The chosen columns of words [n, W], each in one piece [columns, at least n], an even number with 0 after n.

    Lines are not a multiple of 4 KiB apart, where stores to them would evict one another.
    """
    lines = np.zeros((columns.shape[0], (words.shape[0] + 1) // 2 * 2 + 16), np.int32)
    for token in range(words.shape[0]):
        for word in range(columns.shape[0]):
            lines[word, token] = words[token, columns[word]]
    return lines
