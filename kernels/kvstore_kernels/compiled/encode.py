"""Vectors to packed signs and scales: the reference's arithmetic in float64, one vector at a time."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel, reassociating
from kvstore_kernels.compiled.rows import DenseBlocks
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.reference.encode import check_input, check_range, group_levels, step_widths
from kvstore_kernels.types import AffineEncoder, Encoder, SignEncoder, Signs

BLOCK_TOKENS = 256

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


def encode(x: Tensor, encoder: Encoder) -> Signs:
    """As `reference.encode.encode`."""
    check_input(x, encoder)
    layout = encoder.layout
    words = np.zeros((len(x), layout.words), np.int32)
    scales = np.zeros((len(x), layout.scales))
    blocks, means = DenseBlocks(x), encoder.mean.numpy()
    codes = [_SignCode(encoder, head) for head in range(layout.heads)] if isinstance(encoder, SignEncoder) else []

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        for head, groups in enumerate(layout.word_groups):
            if not groups:
                continue
            centred = (blocks.read(block, head) - means[head]).astype(np.float64)
            own_words = words[block, layout.word_starts[head] : layout.word_starts[head + 1]]
            own_scales = scales[block, layout.scale_starts[head] : layout.scale_starts[head + 1]]
            if isinstance(encoder, AffineEncoder):
                _affine(centred, encoder.planes, own_words, own_scales)
            else:
                codes[head].encode(centred, own_words, own_scales)

    run(task, -(-len(x) // BLOCK_TOKENS))
    wide = torch.from_numpy(scales)
    check_range(wide, encoder)
    return Signs(torch.from_numpy(words), wide.half())


class _SignCode:
    """One head's encoder as arrays."""

    def __init__(self, encoder: SignEncoder, head: int) -> None:
        code, groups = encoder.heads[head], encoder.layout.word_groups[head]
        per_group = [group_levels(code, groups, group) for group in range(encoder.layout.groups)]
        self._projection = np.ascontiguousarray(code.projection.numpy().T, np.float64)
        self._levels = torch.stack([levels for levels, _ in per_group]).numpy()
        self._coded = torch.stack([coded for _, coded in per_group]).numpy() if encoder.coded_energy else None
        self._support = encoder.support.numpy().astype(np.float64)
        self._norm_factor = np.array(encoder.norm_factor) if encoder.norm_factor else None
        self._cells = code.depth.numpy().astype(np.int64), step_widths(code).numpy(), code.sigma.double().numpy()
        self._rows = code.row_coordinate.numpy().astype(np.int64), code.row_shift.numpy().astype(np.int64)

    def encode(self, x: Doubles, words: NDArray[np.int32], scales: Doubles) -> None:
        z = np.zeros((len(x), self._projection.shape[1]))
        _project(x, self._projection, z)
        index = np.empty(z.shape, np.int64)
        _indices(z, *self._cells, index)
        _pack(index, *self._rows, words)
        if self._coded is None:
            _energies(x, self._support, scales)
        else:
            _energies(z, self._coded, scales)
        if self._norm_factor is None:
            _divide_by_inner(z, index, self._levels, scales)
        else:
            scales[:] = self._norm_factor * np.sqrt(scales)


@reassociating
def _project(x: Doubles, projection: Doubles, z: Doubles) -> None:
    """z[n] += projection^T x[n], projection [D, C] with D a multiple of 4."""
    for row in range(x.shape[0]):
        own = z[row]
        for channel in range(0, x.shape[1], 4):
            x0, x1, x2, x3 = x[row, channel], x[row, channel + 1], x[row, channel + 2], x[row, channel + 3]
            for c in range(projection.shape[1]):
                own[c] += (
                    x0 * projection[channel, c]
                    + x1 * projection[channel + 1, c]
                    + x2 * projection[channel + 2, c]
                    + x3 * projection[channel + 3, c]
                )


@kernel
def _indices(z: Doubles, depth: Ints, width: Doubles, sigma: Doubles, index: Ints) -> None:
    """The cell of every coordinate; a vector of zeros lies in the cells that begin at 0."""
    coded = np.sum(depth > 0)
    for row in range(z.shape[0]):
        energy = 0.0
        for c in range(z.shape[1]):
            if depth[c] > 0:
                energy += (z[row, c] / sigma[c]) ** 2
        gain = np.sqrt(energy / coded) if energy > 0 else 1.0
        for c in range(z.shape[1]):
            half = (1 << depth[c]) >> 1
            cell = np.floor(z[row, c] / (width[c] * gain)) + half
            cell = min(max(cell, 0.0), 2.0 * half - 1)
            index[row, c] = np.int64(z[row, c] > 0) if depth[c] == 1 else np.int64(cell)


@kernel
def _pack(index: Ints, coordinate: Ints, shift: Ints, words: NDArray[np.int32]) -> None:
    for row in range(index.shape[0]):
        for word in range(words.shape[1]):
            bits = np.int64(0)
            for j in range(32):
                bits |= ((index[row, coordinate[32 * word + j]] >> shift[32 * word + j]) & 1) << j
            words[row, word] = np.int32(bits)


@reassociating
def _energies(x: Doubles, support: Doubles, out: Doubles) -> None:
    """out[n, g] = sum_c x[n, c]^2 support[g, c]."""
    for row in range(x.shape[0]):
        for group in range(support.shape[0]):
            total = 0.0
            for c in range(x.shape[1]):
                total += x[row, c] * x[row, c] * support[group, c]
            out[row, group] = total


@kernel
def _divide_by_inner(z: Doubles, index: Ints, levels: Doubles, scales: Doubles) -> None:
    """scales[n, g] /= sum_c z[n, c] levels[g, index, c], 0 where that is not positive."""
    for row in range(z.shape[0]):
        for group in range(levels.shape[0]):
            along = 0.0
            for c in range(z.shape[1]):
                along += z[row, c] * levels[group, index[row, c], c]
            scales[row, group] = scales[row, group] / along if along > 0 else 0.0


@kernel
def _affine(x: Doubles, planes: int, words: NDArray[np.int32], scales: Doubles) -> None:
    """Word p * G + g of each vector is plane p, most significant first, of its group g of 32 channels."""
    groups, top = x.shape[1] // 32, (1 << planes) - 1
    bits = np.empty(planes, np.int64)
    for row in range(x.shape[0]):
        for group in range(groups):
            own = x[row, 32 * group : 32 * group + 32]
            low, high = own.min(), own.max()
            width = high - low if high > low else 1.0
            bits[:] = 0
            for j in range(32):
                code = np.int64(np.rint((own[j] - low) / width * top))
                for plane in range(planes):
                    bits[plane] |= ((code >> (planes - 1 - plane)) & 1) << j
            for plane in range(planes):
                words[row, plane * groups + group] = np.int32(bits[plane])
            scales[row, group] = (high - low) / top / 2
            scales[row, groups + group] = (high + low) / 2
