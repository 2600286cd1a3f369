"""Vectors rebuilt from packed signs: four bits of a sketch are one look-up of a sum of four rows of E."""

import numpy as np
import torch
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.compiled.rows import Floats, places_of, scale_array, scale_lines, word_array, word_lines
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.shapes import tokens_of
from kvstore_kernels.types import Rows, SignRows

BLOCK_TOKENS = 256


def decode(rows: Rows) -> Tensor:
    """As `reference.decode`."""
    tokens = tokens_of(rows)
    if not isinstance(rows, SignRows):
        return rows.data.float()
    expansion, places = rows.expansion, places_of(rows.expansion)
    words, scales = word_array(rows), scale_array(rows.signs.scales)
    basis = np.empty((0, 0), np.float32) if expansion.offset_basis is None else expansion.offset_basis.numpy()
    out = np.tile(expansion.mean.numpy(), (tokens, 1, 1))
    by_matrix = {id(matrix): _nibble_tables(matrix) for matrix in expansion.matrix}

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        first = 0
        for head, ends in enumerate(places.ends):
            own = slice(first, ends[-1])
            _add_head(
                words[block], places.columns[own], places.rows[own], ends - first,
                scales[block], places.scale_starts[head : head + 2],
                by_matrix[id(expansion.matrix[head])], basis, head, out[block],
            )  # fmt: skip
            first = ends[-1]

    run(task, -(-tokens // BLOCK_TOKENS))
    return torch.from_numpy(out)


def _nibble_tables(matrix: Tensor) -> Floats:
    """[m / 4, 16, D]: sum_j t_j E[4 i + j] with t_j of bit j of the index."""
    tables = np.empty((len(matrix) // 4, 16, matrix.shape[1]), np.float32)
    _fill_tables(matrix.numpy(), tables)
    return tables


@kernel
def _fill_tables(matrix, tables):
    for nibble in range(tables.shape[0]):
        for value in range(16):
            for c in range(matrix.shape[1]):
                total = np.float32(0)
                for j in range(4):
                    row = matrix[4 * nibble + j, c]
                    total += row if (value >> j) & 1 else -row
                tables[nibble, value, c] = total


@kernel
def _add_head(words, columns, places, ends, scales, scale_range, tables, basis, head, out):
    """out[n, h] += sum_g ( alpha_ng E_g^T t_ng + beta_ng f_g )."""
    lines, factors = word_lines(words, columns), scale_lines(scales, scale_range[0], scale_range[1])
    total = np.empty((out.shape[0], out.shape[2]), np.float32)
    first = 0
    for group in range(factors.shape[0]):
        if group < ends.shape[0]:
            total[:] = 0
            for word in range(first, ends[group]):
                _add_word(lines[word], tables[places[word] // 4 : places[word] // 4 + 8], total)
            first = ends[group]
        else:
            for c in range(out.shape[2]):
                total[:, c] = basis[group - ends.shape[0], c]
        for token in range(out.shape[0]):
            for c in range(out.shape[2]):
                out[token, head, c] += factors[group, token] * total[token, c]


@kernel
def _add_word(line, tables, total):
    for token in range(total.shape[0]):
        bits, own = np.uint32(line[token]), total[token]
        row0, row1 = tables[0, bits & np.uint32(15)], tables[1, (bits >> np.uint32(4)) & np.uint32(15)]
        row2, row3 = (
            tables[2, (bits >> np.uint32(8)) & np.uint32(15)],
            tables[3, (bits >> np.uint32(12)) & np.uint32(15)],
        )
        row4, row5 = (
            tables[4, (bits >> np.uint32(16)) & np.uint32(15)],
            tables[5, (bits >> np.uint32(20)) & np.uint32(15)],
        )
        row6, row7 = tables[6, (bits >> np.uint32(24)) & np.uint32(15)], tables[7, bits >> np.uint32(28)]
        for c in range(own.shape[0]):
            own[c] += row0[c] + row1[c] + row2[c] + row3[c] + row4[c] + row5[c] + row6[c] + row7[c]
