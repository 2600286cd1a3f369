"""Stored keys as query rows see them, four rows at a time: a byte of a sketch is one look-up of eight rows of E q.

Integer scores of two query rows share an int64, the second in the upper half: sums of such pairs are pairs of sums.
Measured on a Xeon with AVX-512, 32,768 tokens x 8 heads x 256 bits, 4 query rows a head, one thread: sums over table
entries of int16 or int32 20-30 ms; word by word, with the table of one word in the first-level cache, and packed pairs,
6 ms.
"""

from typing import Protocol

import numpy as np
from torch import Tensor

from kvstore_kernels.compiled.expand import QUAD, expand, query_rows
from kvstore_kernels.compiled.jit import kernel, reassociating
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

NARROW_TOKENS = 128
"""Dense rows that are widened to float32 at once."""

TABLE_BYTES = 4 * 256 * 2 * 8
"""Look-up table of one word for QUAD query rows."""

TABLES_BYTES_MAX = 1 << 26


class KeyReader(Protocol):
    """Keys as seen by the R query rows of each KV head, as `expand.query_rows` has them."""

    def logits(self, tokens: slice, out: Floats) -> None:
        """Fills out [H, R, n], before any soft cap."""
        ...


def key_reader(q: Tensor, keys: Rows, *, sm_scale: float, debias: float = 0.0) -> KeyReader:
    if isinstance(keys, SignRows):
        return _SignKeys(q, keys, sm_scale, debias)
    return _DenseKeys(q, keys, sm_scale)


def rows_max(keys: Rows) -> int:
    """Query rows a KV head that one reader may serve for its tables to stay within TABLES_BYTES_MAX."""
    if not isinstance(keys, SignRows):
        return TABLES_BYTES_MAX
    words = sum(len(matrix) // 32 for matrix in keys.expansion.matrix)
    return QUAD * max(1, TABLES_BYTES_MAX // (TABLE_BYTES * max(words, 1)))


class _SignKeys:
    def __init__(self, q: Tensor, keys: SignRows, sm_scale: float, debias: float) -> None:
        self._words, self._scales = word_array(keys), scale_array(keys.signs.scales)
        self._places = places_of(keys.expansion)
        self._queries = expand(q, keys.expansion, self._places)
        words, rows = self._queries.ints.shape[:2]
        self._tables = np.empty((words, rows // QUAD, 4, 256, 2), np.int64)
        _fill_tables(self._queries.ints, self._tables)
        self._sm_scale, self._penalty = np.float32(sm_scale), np.float32(debias / 2 * sm_scale**2)

    def logits(self, tokens: slice, out: Floats) -> None:
        places, queries, scales = self._places, self._queries, self._scales[tokens]
        _sign_scores(
            self._words[tokens], scales, places.columns, places.ends, places.scale_starts,
            self._tables, queries.step, queries.mean, queries.offsets, out,
        )  # fmt: skip
        _finish(scales, places.scale_starts, queries.noise, self._sm_scale, self._penalty, out)


class _DenseKeys:
    def __init__(self, q: Tensor, keys: DenseRows, sm_scale: float) -> None:
        self._queries = query_rows(q, keys.data.shape[1])
        self._keys, self._sm_scale = dense_array(keys.data), np.float32(sm_scale)

    def logits(self, tokens: slice, out: Floats) -> None:
        if self._keys.narrow:
            _narrow_scores(self._keys.data[tokens], self._keys.bfloat16, self._queries, self._sm_scale, out)
        else:
            _dense_scores(self._keys.data[tokens], 0, self._queries, self._sm_scale, out)


@kernel
def _fill_tables(ints, tables):
    """tables[w, q, b, v, p] = sum_j t_j pair_p,8b+j with t_j of bit j of v.

    Pair p of quad q is row 4 q + 2 p of ints[w], and row 4 q + 2 p + 1 in the upper half.
    """
    nibbles = np.empty((2, 16, 2), np.int64)
    for word in range(tables.shape[0]):
        for quad in range(tables.shape[1]):
            for byte in range(4):
                for half in range(2):
                    for pair in range(2):
                        even, odd = ints[word, 4 * quad + 2 * pair], ints[word, 4 * quad + 2 * pair + 1]
                        for value in range(16):
                            total = np.int64(0)
                            for j in range(4):
                                row = 8 * byte + 4 * half + j
                                both = even[row] + (odd[row] << 32)
                                total += both if (value >> j) & 1 else -both
                            nibbles[half, value, pair] = total
                table = tables[word, quad, byte]
                for high in range(16):
                    upper0, upper1 = nibbles[1, high, 0], nibbles[1, high, 1]
                    for low in range(16):
                        table[16 * high + low, 0] = upper0 + nibbles[0, low, 0]
                        table[16 * high + low, 1] = upper1 + nibbles[0, low, 1]


@kernel
def _sign_scores(words, scales, columns, ends, scale_starts, tables, step, mean, offsets, out):
    """out[h, r, n] = mean_hr + sum_g ( (alpha_ng step_hr) <ints_hrg, t_ng> + beta_ng offsets_hrg )."""
    sums = np.empty((words.shape[0], 2), np.int64)
    start = 0
    for head in range(out.shape[0]):
        lines = word_lines(words, columns[start : ends[head, -1]])
        factors = scale_lines(scales, scale_starts[head], scale_starts[head + 1])
        for row in range(out.shape[1]):
            out[head, row, :] = mean[head, row]
        first = start
        for group in range(min(ends.shape[1], factors.shape[0])):
            for quad in range(tables.shape[1]):
                sums[:] = 0
                for word in range(first, ends[head, group]):
                    _add_word(lines[word - start], tables[word, quad], sums)
                for pair in range(2):
                    row = 4 * quad + 2 * pair
                    _add_pair(sums[:, pair], factors[group], step[head, row : row + 2], out[head, row : row + 2])
            first = ends[head, group]
        for group in range(ends.shape[1], factors.shape[0]):
            for row in range(out.shape[1]):
                for token in range(out.shape[2]):
                    out[head, row, token] += factors[group, token] * offsets[head, row, group - ends.shape[1]]
        start = ends[head, -1]


@kernel
def _add_word(line, tables, sums):
    for token in range(sums.shape[0]):
        bits = np.uint32(line[token])
        low, high = sums[token, 0], sums[token, 1]
        for byte in range(4):
            value = (bits >> np.uint32(8 * byte)) & np.uint32(255)
            low += tables[byte, value, 0]
            high += tables[byte, value, 1]
        sums[token, 0], sums[token, 1] = low, high


@kernel
def _add_pair(pairs, alpha, step, out):
    for token in range(pairs.shape[0]):
        even = np.int32(pairs[token])
        odd = np.int32((pairs[token] - even) >> 32)
        out[0, token] += (alpha[token] * step[0]) * np.float32(even)
        out[1, token] += (alpha[token] * step[1]) * np.float32(odd)


@kernel
def _finish(scales, scale_starts, noise, sm_scale, penalty, out):
    """out = sm_scale out - penalty sum_g alpha_ng^2 noise_hrg."""
    for head in range(out.shape[0]):
        for row in range(out.shape[1]):
            for token in range(out.shape[2]):
                out[head, row, token] *= sm_scale
        if penalty == 0:
            continue
        factors = scale_lines(scales, scale_starts[head], scale_starts[head + 1])
        for group in range(min(noise.shape[2], factors.shape[0])):
            for row in range(out.shape[1]):
                for token in range(out.shape[2]):
                    variance = factors[group, token] * factors[group, token] * noise[head, row, group]
                    out[head, row, token] -= penalty * variance


@kernel
def _narrow_scores(data, bfloat16, queries, sm_scale, out):
    for start in range(0, data.shape[0], NARROW_TOKENS):
        _dense_scores(widen(data[start : start + NARROW_TOKENS], bfloat16), start, queries, sm_scale, out)


@reassociating
def _dense_scores(rows, first, queries, sm_scale, out):
    """out[h, r, first + n] = sm_scale <queries_hr, rows_nh>, in the order in which the rows lie in memory."""
    for token in range(rows.shape[0]):
        place = first + token
        for head in range(rows.shape[1]):
            key = rows[token, head]
            for row in range(0, queries.shape[1], 4):
                query0, query1 = queries[head, row], queries[head, row + 1]
                query2, query3 = queries[head, row + 2], queries[head, row + 3]
                dot0 = dot1 = dot2 = dot3 = np.float32(0)
                for channel in range(key.shape[0]):
                    dot0 += query0[channel] * key[channel]
                    dot1 += query1[channel] * key[channel]
                    dot2 += query2[channel] * key[channel]
                    dot3 += query3[channel] * key[channel]
                out[head, row, place], out[head, row + 1, place] = dot0 * sm_scale, dot1 * sm_scale
                out[head, row + 2, place], out[head, row + 3, place] = dot2 * sm_scale, dot3 * sm_scale
