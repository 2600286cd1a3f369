"""Fitted bases: an invertible matrix F a head, which a codec stores or is given, never makes again.

z = F^T (x - mean) are the coordinates of a vector, in order of falling mean square; x = mean + F^-T z, so a query reads
them as <q, x> = <q, mean> + <F^-1 q, z>. An orthogonal F holds eigenvectors. With a metric M, F = M^1/2 U: |z|^2 is
(x - mean)^T M (x - mean), and U are eigenvectors of M^1/2 C M^1/2.

Whoever fits a basis keeps its bytes. All else here is float64 arithmetic in one order, elementwise, so that equal bytes
give equal codecs on every machine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_PIVOT_MIN = 1e-9
"""Of the largest entry: what remains below it is a basis that loses directions."""


@dataclass(frozen=True, eq=False)
class Basis:
    """Bases of some layers of one kind: `matrix` F [L, H, D, D], float16 or float32, and `weights` float32 [L, H, D].

    A weight is the mean square of a coordinate.
    """

    matrix: Tensor
    weights: Tensor

    def check(self) -> None:
        """ValueError unless shapes agree, all is finite, weights are positive and every F can be inverted."""
        if self.matrix.dim() != 4 or self.matrix.shape[3] != self.matrix.shape[2]:
            raise ValueError(f"a basis is [layers, heads, D, D], not {[*self.matrix.shape]}")
        if self.weights.shape != self.matrix.shape[:3]:
            raise ValueError(f"weights are {[*self.weights.shape]}, not {[*self.matrix.shape[:3]]}")
        if not (self.matrix.isfinite().all() and self.weights.isfinite().all() and (self.weights > 0).all()):
            raise ValueError("a basis holds NaN or Inf, or a weight that is not positive")
        for layer in self.matrix:
            inverse_of(layer)


def inverse_of(matrix: Tensor) -> NDArray[np.float64]:
    """F^-1 of each F [H, D, D], by elimination in place with row pivots; ValueError if one is singular."""
    out = matrix.double().numpy().copy()
    heads, d, _ = out.shape
    smallest = _PIVOT_MIN * np.abs(out).max(axis=(1, 2))
    every, part, pivots = np.arange(heads), np.empty_like(out), []
    for column in range(d):
        pivot = column + np.abs(out[:, column:, column]).argmax(axis=1)
        out[every, column], out[every, pivot] = out[every, pivot], out[every, column]
        pivots.append(pivot)
        if (np.abs(out[:, column, column]) <= smallest).any():
            raise ValueError("a basis is singular")
        scale, factors = 1 / out[:, column, column], out[:, :, column].copy()
        factors[:, column] = 0
        out[:, :, column] = 0
        out[:, column, column] = 1
        out[:, column] *= scale[:, None]
        np.multiply(factors[:, :, None], out[:, column, None], out=part)
        out -= part
    for column, pivot in reversed(list(enumerate(pivots))):
        out[every, :, column], out[every, :, pivot] = out[every, :, pivot], out[every, :, column]
    return out


def banded(rows: NDArray[np.float64], band: int) -> NDArray[np.float64]:
    """Orthonormal Hadamard matrices over bands of rows [H, D, ...]: equal mean squares within each band."""
    out = rows
    half = 1
    while half < band:
        pairs = out.reshape(rows.shape[0], -1, 2, half, *rows.shape[2:])
        out = np.concatenate([pairs[:, :, :1] + pairs[:, :, 1:], pairs[:, :, :1] - pairs[:, :, 1:]], axis=2)
        half *= 2
    return out.reshape(rows.shape) / np.sqrt(band)
