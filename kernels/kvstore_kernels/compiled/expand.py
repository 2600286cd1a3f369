"""The integer query of `reference.expand`, of all heads in one call."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvstore_kernels.compiled.jit import kernel, reassociating
from kvstore_kernels.compiled.rows import Floats, Places
from kvstore_kernels.reference.expand import SMALLEST_STEP
from kvstore_kernels.types import Expansion

QUAD = 4
"""Query rows of a KV head that one pass over its rows serves."""


@dataclass(frozen=True)
class Queries:
    """The fields of `reference.expand.HeadQueries` for R query rows of each KV head, padded by `query_rows`.

    Words are in the order of Places.columns.
    """

    ints: NDArray[np.int64]  # [w, R, 32]
    step: Floats  # [H, R]
    mean: Floats  # [H, R]
    offsets: Floats  # [H, R, G], no columns where the layout has no offsets
    noise: Floats  # [H, R, G]


def query_rows(q: Tensor, heads: int) -> Floats:
    """q [T, Hq, D] as float32 [H, R, D]: row t * (Hq / H) + g, then rows of zeros up to a multiple of QUAD."""
    rows = q.detach().float().numpy().reshape(len(q), heads, -1, q.shape[2]).swapaxes(0, 1)
    rows = rows.reshape(heads, -1, q.shape[2])
    out = np.zeros((heads, padded(rows.shape[1]), q.shape[2]), np.float32)
    out[:, : rows.shape[1]] = rows
    return out


def padded(rows: int) -> int:
    return -(-rows // QUAD) * QUAD


def expand(q: Tensor, expansion: Expansion, places: Places) -> Queries:
    """The expanded queries of q [T, Hq, D]."""
    rows = query_rows(q, expansion.layout.heads)
    heads, count, basis = len(rows), rows.shape[1], expansion.offset_basis
    offset_basis = np.empty((0, rows.shape[2]), np.float32) if basis is None else basis.numpy()
    out = Queries(
        ints=np.empty((len(places.columns), count, 32), np.int64),
        step=np.zeros((heads, count), np.float32),
        mean=np.empty((heads, count), np.float32),
        offsets=np.empty((heads, count, len(offset_basis)), np.float32),
        noise=np.zeros((heads, count, expansion.layout.groups), np.float32),
    )
    largest, first = np.float32(2 ** (expansion.query_bits - 1) - 1), 0
    for head, ends in enumerate(places.ends):
        matrix, noise = expansion.matrix[head].numpy(), expansion.noise[head].numpy()
        _expand_head(
            rows[head], matrix, noise, places.rows[first : ends[-1]], ends - first, largest, np.float32(SMALLEST_STEP),
            out.ints[first : ends[-1]], out.step[head], out.noise[head],
        )  # fmt: skip
        _project(rows[head], offset_basis, out.offsets[head])
        first = ends[-1]
    for head, mean in enumerate(expansion.mean.numpy()):
        _project(rows[head], mean[None], out.mean[head, :, None])
    return out


@kernel
def _expand_head(queries, matrix, noise, places, ends, largest, smallest, ints, step, variance):
    y = np.empty((queries.shape[0], matrix.shape[0]), np.float32)
    _project(queries, matrix, y)
    for row in range(y.shape[0]):
        best = np.float32(0)
        for i in range(y.shape[1]):
            best = max(best, abs(y[row, i]))
        width = best / largest
        usable = width >= smallest
        step[row] = width if usable else np.float32(0)
        first = 0
        for group in range(ends.shape[0]):
            total = 0.0
            for word in range(first, ends[group]):
                for j in range(32):
                    i = places[word] + j
                    ints[word, row, j] = np.int64(np.rint(y[row, i] / width)) if usable else 0
                    total += np.float64(noise[i]) * (np.float64(y[row, i]) * np.float64(y[row, i]))
            variance[row, group] = total
            first = ends[group]


@reassociating
def _project(queries, matrix, out):
    """out[r, i] = <matrix_i, queries_r>, summed in float64."""
    for i in range(matrix.shape[0]):
        for row in range(queries.shape[0]):
            total = 0.0
            for channel in range(matrix.shape[1]):
                total += np.float64(queries[row, channel]) * np.float64(matrix[i, channel])
            out[row, i] = total
