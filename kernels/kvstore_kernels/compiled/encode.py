"""Vectors to packed signs and scales: the reference's arithmetic in float64, one vector at a time."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel, reassociating
from kvstore_kernels.compiled.rows import dense_array, widen
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.reference.encode import check_finite, check_range, check_shape, group_levels, step_widths
from kvstore_kernels.types import AffineEncoder, Encoder, HeadEncoder, SignEncoder, Signs

BLOCK_TOKENS = 256


def encode(x: Tensor, encoder: Encoder) -> Signs:
    """As `reference.encode`."""
    check_shape(x, encoder)
    layout = encoder.layout
    words = np.zeros((len(x), layout.words), np.int32)
    scales = np.zeros((len(x), layout.scales))
    source, means = dense_array(x), encoder.mean.numpy()
    codes = _codes(encoder) if isinstance(encoder, SignEncoder) else {}
    count = -(-len(x) // BLOCK_TOKENS)
    finite = np.ones(count, np.bool_)

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        vectors = widen(source.data[block], source.bfloat16) if source.narrow else source.data[block]
        finite[index] = np.isfinite(vectors).all()
        if not finite[index]:  # NaN has no cell: the kernels would read outside their tables
            return
        for head, groups in enumerate(layout.word_groups):
            rows = vectors[:, head]
            own_words = words[block, layout.word_starts[head] : layout.word_starts[head + 1]]
            own_scales = scales[block, layout.scale_starts[head] : layout.scale_starts[head + 1]]
            if groups and isinstance(encoder, AffineEncoder):
                _affine(rows, means[head], encoder.planes, own_words, own_scales)
            elif groups:
                _signs(rows, means[head], *codes[head], own_words, own_scales)

    run(task, count)
    if not finite.all():
        check_finite(x)
    wide = torch.from_numpy(scales)
    check_range(wide, encoder)
    return Signs(torch.from_numpy(words), wide.half())


def _codes(encoder: SignEncoder) -> dict[int, tuple[NDArray, ...]]:
    """For each head with words what `_signs` reads of its encoder."""
    norm_factor, support = np.array(encoder.norm_factor or ()), encoder.support.numpy().astype(np.float64)
    if encoder.coded_energy:
        support = support[:0]
    return {
        head: (*_code(code, groups, encoder.layout.groups), support, norm_factor)
        for head, (code, groups) in enumerate(zip(encoder.heads, encoder.layout.word_groups, strict=True))
        if groups
    }


@lru_cache(512)
def _code(code: HeadEncoder, word_groups: tuple[int, ...], groups: int) -> tuple[NDArray, ...]:
    """The parts that sessions share: made once a basis, because an append of one token costs less than they do."""
    parts = [group_levels(code, word_groups, group) for group in range(groups)]
    return (
        np.ascontiguousarray(code.projection.numpy().T, np.float64),
        code.depth.numpy().astype(np.int64),
        step_widths(code).numpy(),
        code.sigma.double().numpy(),
        code.row_coordinate.numpy().astype(np.int64),
        code.row_shift.numpy().astype(np.int64),
        torch.stack([levels for levels, _ in parts]).numpy(),
        torch.stack([coded for _, coded in parts]).numpy(),
    )


@kernel
def _signs(
    rows, mean, projection, depth, width, sigma, coordinate, shift, levels, coded, support, norm_factor, words, scales
):
    """Words and scales of rows [n, D]. An empty `support` asks for coded energy, an empty `norm_factor` for `ip`."""
    x = np.zeros((4, rows.shape[1]))
    z = np.empty((4, projection.shape[1]))
    index = np.empty(projection.shape[1], np.int64)
    for start in range(0, rows.shape[0], 4):
        quad = min(4, rows.shape[0] - start)
        for i in range(quad):
            for channel in range(rows.shape[1]):
                x[i, channel] = rows[start + i, channel] - mean[channel]
        _project(x, projection, z)
        for i in range(quad):
            _indices(z[i], depth, width, sigma, index)
            _pack(index, coordinate, shift, words[start + i])
            for group in range(levels.shape[0]):
                energy = _energy(x[i], support[group]) if len(support) else _energy(z[i], coded[group])
                if len(norm_factor):
                    scales[start + i, group] = norm_factor[group] * np.sqrt(energy)
                else:
                    along = _along(z[i], index, levels[group])
                    scales[start + i, group] = energy / along if along > 0 else 0.0


@reassociating
def _project(x, projection, z):
    """z = x projection for four rows x [4, D] and projection [D, C], four channels a pass: D is a multiple of 32."""
    z[:] = 0
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    for channel in range(0, x.shape[1], 4):
        a0, a1, a2, a3 = x[0, channel], x[0, channel + 1], x[0, channel + 2], x[0, channel + 3]
        b0, b1, b2, b3 = x[1, channel], x[1, channel + 1], x[1, channel + 2], x[1, channel + 3]
        c0, c1, c2, c3 = x[2, channel], x[2, channel + 1], x[2, channel + 2], x[2, channel + 3]
        d0, d1, d2, d3 = x[3, channel], x[3, channel + 1], x[3, channel + 2], x[3, channel + 3]
        row0, row1 = projection[channel], projection[channel + 1]
        row2, row3 = projection[channel + 2], projection[channel + 3]
        for c in range(z.shape[1]):
            p0, p1, p2, p3 = row0[c], row1[c], row2[c], row3[c]
            z0[c] += a0 * p0 + a1 * p1 + a2 * p2 + a3 * p3
            z1[c] += b0 * p0 + b1 * p1 + b2 * p2 + b3 * p3
            z2[c] += c0 * p0 + c1 * p1 + c2 * p2 + c3 * p3
            z3[c] += d0 * p0 + d1 * p1 + d2 * p2 + d3 * p3


@kernel
def _indices(z, depth, width, sigma, index):
    """The cell of every coordinate; a vector of zeros lies in the cells that begin at 0."""
    deepest, energy, coded = np.int64(0), 0.0, 0
    for c in range(z.shape[0]):
        deepest = max(deepest, depth[c])
    if deepest <= 1:
        for c in range(z.shape[0]):
            index[c] = np.int64(z[c] > 0)
        return
    for c in range(z.shape[0]):
        if depth[c] > 0:
            energy += (z[c] / sigma[c]) ** 2
            coded += 1
    gain = np.sqrt(energy / coded) if energy > 0 else 1.0
    for c in range(z.shape[0]):
        half = (1 << depth[c]) >> 1
        cell = np.floor(z[c] / (width[c] * gain)) + half
        cell = max(min(cell, 2.0 * half - 1), 0.0)
        index[c] = np.int64(z[c] > 0) if depth[c] == 1 else np.int64(cell)


@kernel
def _pack(index, coordinate, shift, words):
    for word in range(words.shape[0]):
        bits = np.int64(0)
        for j in range(32):
            bits |= ((index[coordinate[32 * word + j]] >> shift[32 * word + j]) & 1) << j
        words[word] = np.int32(bits)


@reassociating
def _energy(values, chosen):
    total = 0.0
    for c in range(values.shape[0]):
        total += values[c] * values[c] * chosen[c]
    return total


@kernel
def _along(z, index, levels):
    """<z, y> of the reconstruction y_c = levels[index_c, c]."""
    total = 0.0
    for c in range(z.shape[0]):
        total += z[c] * levels[index[c], c]
    return total


@kernel
def _affine(rows, mean, planes, words, scales):
    """Word p * G + g of each vector is plane p, most significant first, of its group g of 32 channels."""
    groups, top = rows.shape[1] // 32, (1 << planes) - 1
    x = np.empty(32)
    bits = np.empty(planes, np.int64)
    for row in range(rows.shape[0]):
        for group in range(groups):
            for j in range(32):
                x[j] = rows[row, 32 * group + j] - mean[32 * group + j]
            low = high = x[0]
            for j in range(1, 32):
                low, high = min(low, x[j]), max(high, x[j])
            width = high - low if high > low else 1.0
            bits[:] = 0
            for j in range(32):
                code = np.int64(np.rint((x[j] - low) / width * top))
                for plane in range(planes):
                    bits[plane] |= ((code >> (planes - 1 - plane)) & 1) << j
            for plane in range(planes):
                words[row, plane * groups + group] = np.int32(bits[plane])
            scales[row, group] = (high - low) / top / 2
            scales[row, groups + group] = (high + low) / 2
