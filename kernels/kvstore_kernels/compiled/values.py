"""Stored values as sums over tokens.

The sign-weighted sums add a token's weight where its bit is 0, under a mask, and come out as (sum of all weights) - 2
(that): half the work of adding +-weight, and of the two bits the one that x86 compilers turn into a masked addition.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvstore_kernels.compiled.jit import kernel, reassociating
from kvstore_kernels.compiled.keys import NARROW_TOKENS
from kvstore_kernels.compiled.rows import (
    Floats,
    dense_array,
    places_of,
    scale_array,
    scale_lines,
    widen,
    word_array,
    word_lines,
)
from kvstore_kernels.types import DenseRows, Rows, SignRows

Doubles = NDArray[np.float64]

SUM_TOKENS = 256
"""Tokens whose weighted sum is in float32."""

BIT = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)


class ValueReader(Protocol):
    """Values as sums over tokens, from which `combine` makes sum_n p_n v^_n; `width` sums a query row."""

    width: int

    def add(self, tokens: slice, weights: Floats, sums: Doubles) -> None:
        """Adds the sums of weights [H, R, n] to sums [H, R, width]."""
        ...

    def combine(self, head: int, sums: Doubles, total: Doubles) -> Doubles:
        """[R, D] of sums [R, width] and the sum of weights [R]."""
        ...


def value_reader(values: Rows) -> ValueReader:
    return _SignValues(values) if isinstance(values, SignRows) else _DenseValues(values)


class _SignValues:
    """Sums of a head: one a group's offset, then one a sign row."""

    def __init__(self, values: SignRows) -> None:
        self._expansion, self._places = values.expansion, places_of(values.expansion)
        self._words, self._scales = word_array(values), scale_array(values.signs.scales)
        self.width = values.expansion.layout.groups + max(len(matrix) for matrix in values.expansion.matrix)

    def add(self, tokens: slice, weights: Floats, sums: Doubles) -> None:
        places = self._places
        _sign_sums(
            self._words[tokens], self._scales[tokens], places.columns, places.ends, places.scale_starts,
            places.rows, weights, BIT, sums,
        )  # fmt: skip

    def combine(self, head: int, sums: Doubles, total: Doubles) -> Doubles:
        groups, matrix = self._expansion.layout.groups, self._expansion.matrix[head].numpy()
        out = total[:, None] * self._expansion.mean[head].numpy().astype(np.float64)
        out += sums[:, groups : groups + len(matrix)] @ matrix.astype(np.float64)
        if self._expansion.offset_basis is not None:
            out += sums[:, :groups] @ self._expansion.offset_basis.numpy().astype(np.float64)
        return out


class _DenseValues:
    def __init__(self, values: DenseRows) -> None:
        self._values, self.width = dense_array(values.data), values.data.shape[2]

    def add(self, tokens: slice, weights: Floats, sums: Doubles) -> None:
        if self._values.narrow:
            _narrow_sums(self._values.data[tokens], self._values.bfloat16, weights, sums)
        else:
            _dense_sums(self._values.data[tokens], 0, weights, sums)

    def combine(self, head: int, sums: Doubles, total: Doubles) -> Doubles:
        return sums


@kernel
def _sign_sums(words, scales, columns, ends, scale_starts, rows, weights, bit, sums):
    """sums[h, r, G + i] += sum_n weights[h, r, n] alpha_ng t_ni, and sums[h, r, g] += sum_n weights[h, r, n] beta_ng.

    In float32 over SUM_TOKENS tokens, then in float64.
    """
    count, groups = words.shape[0], ends.shape[1]
    scaled = np.zeros(((count + 1) // 2 * 2, 4), np.float32)
    totals, zeros = np.empty(4), np.empty((4, 32), np.float32)
    start = 0
    for head in range(ends.shape[0]):
        lines = word_lines(words, columns[start : ends[head, -1]])
        factors = scale_lines(scales, scale_starts[head], scale_starts[head + 1])
        first = start
        for group in range(min(groups, factors.shape[0])):
            for quad in range(weights.shape[1] // 4):
                own = sums[head, 4 * quad : 4 * quad + 4]
                _scale(weights[head, 4 * quad : 4 * quad + 4], factors[group], scaled, totals)
                for word in range(first, ends[head, group]):
                    place = groups + rows[word]
                    for token in range(0, count, SUM_TOKENS):
                        part = slice(token, token + SUM_TOKENS)
                        zeros[:] = 0
                        _add_zeros(lines[word - start, part], scaled[part], bit, zeros)
                        for row in range(4):
                            for j in range(32):
                                own[row, place + j] -= 2 * np.float64(zeros[row, j])
                    for row in range(4):
                        for j in range(32):
                            own[row, place + j] += totals[row]
            first = ends[head, group]
        for group in range(groups, factors.shape[0]):
            for row in range(weights.shape[1]):
                sums[head, row, group - groups] += _dot(weights[head, row], factors[group])
        start = ends[head, -1]


@kernel
def _scale(weights, alpha, scaled, totals):
    """scaled[n, r] = weights[r, n] alpha[n] and its sums over n."""
    totals[:] = 0
    for token in range(alpha.shape[0]):
        for row in range(4):
            scaled[token, row] = weights[row, token] * alpha[token]
            totals[row] += scaled[token, row]


@kernel
def _add_zeros(line, weights, bit, zeros):
    """zeros[r, j] += sum over tokens whose bit j is 0 of weights[n, r]; two tokens a pass over the sums."""
    for token in range(0, weights.shape[0], 2):
        word, next_word = line[token], line[token + 1]
        a0, a1, a2, a3 = weights[token, 0], weights[token, 1], weights[token, 2], weights[token, 3]
        b0, b1, b2, b3 = weights[token + 1, 0], weights[token + 1, 1], weights[token + 1, 2], weights[token + 1, 3]
        for j in range(32):
            sum0, sum1, sum2, sum3 = zeros[0, j], zeros[1, j], zeros[2, j], zeros[3, j]
            one = (word & bit[j]) != 0
            sum0 = sum0 if one else sum0 + a0
            sum1 = sum1 if one else sum1 + a1
            sum2 = sum2 if one else sum2 + a2
            sum3 = sum3 if one else sum3 + a3
            one = (next_word & bit[j]) != 0
            sum0 = sum0 if one else sum0 + b0
            sum1 = sum1 if one else sum1 + b1
            sum2 = sum2 if one else sum2 + b2
            sum3 = sum3 if one else sum3 + b3
            zeros[0, j], zeros[1, j], zeros[2, j], zeros[3, j] = sum0, sum1, sum2, sum3


@reassociating
def _dot(weights, beta):
    total = 0.0
    for token in range(beta.shape[0]):
        total += np.float64(weights[token]) * beta[token]
    return total


@kernel
def _narrow_sums(data, bfloat16, weights, sums):
    for start in range(0, data.shape[0], NARROW_TOKENS):
        _dense_sums(widen(data[start : start + NARROW_TOKENS], bfloat16), start, weights, sums)


@reassociating
def _dense_sums(rows, first, weights, sums):
    """sums[h, r] += sum_n weights[h, r, first + n] rows[n, h], in float32 over SUM_TOKENS tokens, then in float64."""
    parts = np.empty((weights.shape[0], weights.shape[1], rows.shape[2]), np.float32)
    for start in range(0, rows.shape[0], SUM_TOKENS):
        stop = min(start + SUM_TOKENS, rows.shape[0])
        parts[:] = 0
        for token in range(start, stop - 3, 4):
            for head in range(rows.shape[1]):
                row0, row1 = rows[token, head], rows[token + 1, head]
                row2, row3 = rows[token + 2, head], rows[token + 3, head]
                for row in range(weights.shape[1]):
                    w0, w1 = weights[head, row, first + token], weights[head, row, first + token + 1]
                    w2, w3 = weights[head, row, first + token + 2], weights[head, row, first + token + 3]
                    part = parts[head, row]
                    for c in range(part.shape[0]):
                        part[c] += w0 * row0[c] + w1 * row1[c] + w2 * row2[c] + w3 * row3[c]
        for token in range(stop - (stop - start) % 4, stop):
            for head in range(rows.shape[1]):
                for row in range(weights.shape[1]):
                    for c in range(rows.shape[2]):
                        parts[head, row, c] += weights[head, row, first + token] * rows[token, head, c]
        for head in range(parts.shape[0]):
            for row in range(parts.shape[1]):
                for c in range(parts.shape[2]):
                    sums[head, row, c] += np.float64(parts[head, row, c])
