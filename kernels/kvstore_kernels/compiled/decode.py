"""Vectors rebuilt from packed signs: four bits of a sketch are one look-up of a sum of four rows of E."""

import numpy as np
import torch
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.compiled.rows import Floats, scale_lines, sign_arrays, word_lines
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.shapes import tokens_of
from kvstore_kernels.types import Rows, SignRows

BLOCK_TOKENS = 256


def decode(rows: Rows) -> Tensor:
    """As `reference.decode.decode`."""
    tokens = tokens_of(rows)
    if not isinstance(rows, SignRows):
        return rows.data.float()
    expansion, stored = rows.expansion, sign_arrays(rows)
    out = np.tile(expansion.mean.numpy(), (tokens, 1, 1))
    by_matrix = {id(matrix): _nibble_tables(matrix) for matrix in expansion.matrix}

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        words, scales = stored.words[block], stored.scales[block]
        first = 0
        for head, ends in enumerate(stored.ends):
            tables, columns = by_matrix[id(expansion.matrix[head])], stored.columns[first : ends[-1]]
            places = stored.rows[first : ends[-1]]
            start, end = stored.scale_starts[head : head + 2]
            factors = scale_lines(scales, start, end)
            _add_signs(word_lines(words, columns), places, ends - first, tables, factors, out[block, head])
            first = ends[-1]
            if expansion.offset_basis is not None and end > start:
                out[block, head] += factors[len(ends) :].T @ expansion.offset_basis.numpy()

    run(task, -(-tokens // BLOCK_TOKENS))
    return torch.from_numpy(out)


def _nibble_tables(matrix: Tensor) -> Floats:
    """[m / 4, 16, D]: sum_j t_j E[4 i + j] with t_j of bit j of the index."""
    signs = 2.0 * (torch.arange(16).unsqueeze(1) >> torch.arange(4) & 1) - 1
    return (signs @ matrix.unflatten(0, (-1, 4))).numpy()


@kernel
def _add_signs(lines, places, ends, tables, factors, out):
    """out[n] += sum_g factors[g, n] sum_w tables[w][bits], group by group."""
    total = np.empty(out.shape[1], np.float32)
    for token in range(out.shape[0]):
        first = 0
        for group in range(min(ends.shape[0], factors.shape[0])):
            total[:] = 0
            for word in range(first, ends[group]):
                _add_word(np.uint32(lines[word, token]), tables[places[word] // 4 : places[word] // 4 + 8], total)
            for channel in range(out.shape[1]):
                out[token, channel] += factors[group, token] * total[channel]
            first = ends[group]


@kernel
def _add_word(bits, tables, total):
    for nibble in range(0, 8, 2):
        low = tables[nibble, (bits >> np.uint32(4 * nibble)) & np.uint32(15)]
        high = tables[nibble + 1, (bits >> np.uint32(4 * nibble + 4)) & np.uint32(15)]
        for channel in range(total.shape[0]):
            total[channel] += low[channel] + high[channel]
