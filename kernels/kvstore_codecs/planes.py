"""Constants of uniform sign planes on a unit normal coordinate, computed from the normal distribution itself.

A coordinate z ~ N(0, 1) stored with b planes has the natural-binary index of a uniform quantiser of width STEP[b]
centred on zero, outer cells open; plane p is t_p = +-1, most significant first. A reader of the first r planes sees
y = sum_p w_p t_p.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from kvstore_kernels.types import STEP, plane_weights


@dataclass(frozen=True)
class PlaneCode:
    """How `read` of `stored` planes are read: `weights` w, `gain` E[z y] and `energy` E[y^2] of y = sum_p w_p t_p."""

    weights: tuple[float, ...]
    gain: float
    energy: float

    @property
    def mse(self) -> float:
        return 1 - 2 * self.gain + self.energy

    @property
    def noise(self) -> float:
        """Variance of <q, x^> in units of (scale * |q|)^2, for a scale that keeps <x, x^> right.

        (z - y / gain) has the variance energy / gain^2 - 1 and the scale is rms(x) / gain: energy - gain^2, which is
        D (1 - D) where the weights are the least-squares ones and D their error.
        """
        return self.energy - self.gain**2


@cache
def plane_code(stored: int, read: int) -> PlaneCode:
    """All planes have the encoder's own weights; fewer are refitted by least squares for their depth."""
    gram, cross = _moments(stored)
    gram, cross = gram[:read, :read], cross[:read]
    fitted = np.array(plane_weights(stored)) if read == stored else np.round(np.linalg.solve(gram, cross), 6)
    return PlaneCode(tuple(fitted.tolist()), float(fitted @ cross), float(fitted @ gram @ fitted))


def level_weights(stored: int, read: int) -> tuple[float, ...]:
    """The weights of a level, times the ratio of its scale to the stored one, which is rms / gain of all planes."""
    ratio = plane_code(stored, stored).gain / plane_code(stored, read).gain
    return tuple(round(ratio * weight, 6) for weight in plane_code(stored, read).weights)


def _moments(stored: int) -> tuple[np.ndarray, np.ndarray]:
    """E[t_p t_q] and E[z t_p] by summing the quantiser's cells."""
    cells = 2**stored
    inner = [STEP[stored] * (i - cells // 2) for i in range(1, cells)]
    normal = NormalDist()
    mass = np.diff([0.0, *map(normal.cdf, inner), 1.0])
    first = -np.diff([0.0, *map(normal.pdf, inner), 0.0])
    shifts = np.arange(stored - 1, -1, -1)[:, None]
    signs = 2.0 * (np.arange(cells) >> shifts & 1) - 1
    return (signs * mass) @ signs.T, signs @ first
