"""`matryoshka`: a fitted basis that orders and allocates sign planes, so that every prefix of them is a coarser sketch.

After MatryoshkaKV (arXiv 2410.14731), whose basis orders coordinates; here it orders bits. Bands of neighbouring
coordinates are mixed by a Hadamard matrix, so that one weight is right for all of a band, and get uniform planes as
`rotated` has them; `allocation` says how many.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore_codecs.allocation import PlaneOrder
from kvstore_codecs.plan import SignPlan
from kvstore_codecs.planes import plane_code
from kvstore_codecs.transform import Basis, banded, inverse_of
from kvstore_kernels.types import WORD_ROWS, Expansion, HeadEncoder, SignEncoder, SignLayout, plane_weights

QUERY_BITS = 12


class _Head:
    """One head that stores `words`: rows are those of its planes in order of value, `band` coordinates a plane."""

    def __init__(
        self, order: PlaneOrder, words: int, forward: NDArray[np.float64], inverse: NDArray[np.float64]
    ) -> None:
        """`forward` and `inverse` [D, D]: rows of F^T and F^-1 after the Hadamard matrices of the bands."""
        self.band = order.band
        count = words * WORD_ROWS // self.band
        self.bands, self.planes = order.bands[:count], order.planes[:count]
        self.sigma = np.sqrt(order.weights)
        self.depth = np.bincount(self.bands, minlength=len(self.sigma))
        self.coded = np.flatnonzero(self.depth)
        self._forward, self._inverse = forward, inverse

    def encoder(self) -> HeadEncoder:
        place = np.cumsum(self.depth > 0) - 1
        weights = [
            plane_weights(int(self.depth[band]))[plane] * self.sigma[band]
            for band, plane in zip(self.bands, self.planes, strict=True)
        ]
        coordinates = (place[self.bands, None] * self.band + np.arange(self.band)).reshape(-1)
        shifts = (self.depth[self.bands] - 1 - self.planes).repeat(self.band)
        return HeadEncoder(
            projection=_float32(self._rows(self._forward, self.coded)),
            depth=torch.from_numpy(self.depth[self.coded].repeat(self.band)).int(),
            sigma=_float32(self.sigma[self.coded].repeat(self.band)),
            row_coordinate=torch.from_numpy(coordinates).int(),
            row_shift=torch.from_numpy(shifts).int(),
            row_weight=_float32(np.array(weights).repeat(self.band)),
        )

    def expansion(self, words: int) -> tuple[torch.Tensor, torch.Tensor]:
        """E [m, D] and noise [m] of a reader of the first `words` words.

        The stored scale is that of all planes: a prefix takes it times the ratio that a normal vector has.
        """
        count = words * WORD_ROWS // self.band
        bands, planes = self.bands[:count], self.planes[:count]
        read = np.bincount(bands, minlength=len(self.sigma))
        ratio = round(self._scale(read) / self._scale(self.depth), 6) if words else 1.0
        factors, noise = np.empty(count), np.zeros(count)
        for row, (band, plane) in enumerate(zip(bands, planes, strict=True)):
            code = plane_code(int(self.depth[band]), int(read[band]))
            factors[row] = code.weights[plane] * self.sigma[band] * ratio
            if plane == 0:
                noise[row] = code.noise / code.weights[0] ** 2
        matrix = self._rows(self._inverse, bands) * factors.repeat(self.band)[:, None]
        return _float32(matrix), _float32(noise.repeat(self.band))

    def _scale(self, read: NDArray[np.int64]) -> float:
        """|z|^2 / <z, y> over the bands that are read, of a vector whose coordinates have just their weights."""
        used = [(self.sigma[band] ** 2, int(self.depth[band]), int(read[band])) for band in np.flatnonzero(read)]
        along = math.fsum(weight * plane_code(depth, planes).gain for weight, depth, planes in used)
        return math.fsum(weight for weight, _, _ in used) / along

    def _rows(self, matrix: NDArray[np.float64], bands: NDArray[np.int64]) -> NDArray[np.float64]:
        """The rows of these bands, one band after the other."""
        return matrix.reshape(-1, self.band, matrix.shape[1])[bands].reshape(-1, matrix.shape[1])


def matryoshka_plan(
    basis: Basis, layer: int, orders: list[PlaneOrder], words: list[tuple[int, ...]], mean: torch.Tensor, debias: float
) -> SignPlan:
    """The plan of `basis` row `layer`; head h stores `words[0][h]` words, and level i reads `words[i][h]` of them."""
    d = basis.matrix.shape[2]
    layout = SignLayout(d, 1, tuple((0,) * count for count in words[0]))
    forward = banded(basis.matrix[layer].double().numpy().transpose(0, 2, 1).copy(), orders[0].band)
    inverse = banded(inverse_of(basis.matrix[layer]), orders[0].band)
    heads = [_Head(*parts) for parts in zip(orders, words[0], forward, inverse, strict=True)]
    encoder = SignEncoder(layout, tuple(h.encoder() for h in heads), mean, torch.ones(1, d), coded_energy=True)
    levels = []
    for read in words:
        matrices, noise = zip(*(head.expansion(count) for head, count in zip(heads, read, strict=True)), strict=True)
        levels.append(Expansion(layout, matrices, noise, mean, QUERY_BITS))
    return SignPlan(layout, encoder, tuple(levels), debias)


def level_budgets(bits: float) -> list[float]:
    """Code bits a number that each level reads: a bit less each, down to a half."""
    return [bits - level for level in range(math.ceil(bits)) if level == 0 or bits - level >= 0.5]


def _float32(values: NDArray[np.float64]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))
