"""Vectors rebuilt from packed signs: four bits of a sketch are one look-up of a sum of four rows of E."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel
from kvstore_kernels.compiled.rows import Floats, SignBlocks
from kvstore_kernels.compiled.threads import run
from kvstore_kernels.shapes import tokens_of
from kvstore_kernels.types import Rows, SignRows

BLOCK_TOKENS = 256


def decode(rows: Rows) -> Tensor:
    """As `reference.decode.decode`."""
    tokens = tokens_of(rows)
    if not isinstance(rows, SignRows):
        return rows.data.float()
    expansion, blocks = rows.expansion, SignBlocks(rows)
    layout = expansion.layout
    means = expansion.mean.numpy()
    out = np.empty((tokens, layout.heads, layout.head_dim), np.float32)
    by_matrix = {id(matrix): _nibble_tables(matrix) for matrix in expansion.matrix}
    tables = [by_matrix[id(matrix)] for matrix in expansion.matrix]
    groups = [np.array(groups, np.int64) for groups in layout.word_groups]

    def task(index: int) -> None:
        block = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        for head in range(layout.heads):
            alphas, betas = blocks.scales(block, head)
            out[block, head] = means[head]
            _add_signs(blocks.words(block, head), groups[head], tables[head], alphas, out[block, head])
            if expansion.offset_basis is not None:
                out[block, head] += betas.T @ expansion.offset_basis[: len(betas)].numpy()

    run(task, -(-tokens // BLOCK_TOKENS))
    return torch.from_numpy(out)


def _nibble_tables(matrix: Tensor) -> Floats:
    """[m / 4, 16, D]: sum_j t_j E[4 i + j] with t_j of bit j of the index."""
    signs = 2.0 * (torch.arange(16).unsqueeze(1) >> torch.arange(4) & 1) - 1
    return (signs @ matrix.unflatten(0, (-1, 4))).numpy()


@kernel
def _add_signs(
    words: NDArray[np.int32], groups: NDArray[np.int64], tables: Floats, alphas: Floats, out: Floats
) -> None:
    """out[n] += sum_g alphas[g, n] sum_w tables[w][bits], group by group."""
    total = np.empty(out.shape[1], np.float32)
    for token in range(words.shape[0]):
        for group in range(alphas.shape[0]):
            total[:] = 0
            for word in range(words.shape[1]):
                if groups[word] == group:
                    bits = np.uint32(words[token, word])
                    for nibble in range(0, 8, 2):
                        low = tables[8 * word + nibble, (bits >> np.uint32(4 * nibble)) & np.uint32(15)]
                        high = tables[8 * word + nibble + 1, (bits >> np.uint32(4 * nibble + 4)) & np.uint32(15)]
                        for channel in range(out.shape[1]):
                            total[channel] += low[channel] + high[channel]
            for channel in range(out.shape[1]):
                out[token, channel] += alphas[group, token] * total[channel]
