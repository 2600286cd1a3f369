"""Constants of uniform sign planes on a unit normal coordinate, computed from the normal distribution itself.

A coordinate z ~ N(0, 1) stored with b planes has the natural-binary index of a uniform quantiser of width STEP[b]
centred on zero, outer cells open; plane p is t_p = +-1, most significant first. A reader of the first r planes sees
y = sum_p w_p t_p.
"""

import math
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


def level_weights(stored: int, read: int, d: int) -> tuple[float, ...]:
    """The weights of a level, times the ratio of the scale it needs to the stored one.

    Scales are rms / gain, with the gains of a coordinate of a random vector of length sqrt(d) instead of a normal one:
    tokens are normalised, and the difference, of order 1 / d, would be a bias that all tokens share.
    """
    weights = plane_code(stored, read).weights
    inner, signs = _cells(stored)
    tails = np.maximum(1 - inner**2 / d, 0) ** ((d - 1) / 2) * mean_magnitude(d) * math.sqrt(d) / 2
    cross = signs @ -np.diff(np.concatenate([[0], tails, [0]]))
    ratio = np.dot(plane_code(stored, stored).weights, cross) / np.dot(weights, cross[:read])
    return tuple(round(float(ratio * weight), 6) for weight in weights)


def mean_magnitude(d: int) -> float:
    """E|u_1| of a uniform unit vector u in R^d: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), by its recurrence."""
    value, first = (1.0, 1) if d % 2 else (2 / math.pi, 2)
    for n in range(first, d, 2):
        value *= n / (n + 1)
    return value


def _moments(stored: int) -> tuple[np.ndarray, np.ndarray]:
    """E[t_p t_q] and E[z t_p] of a unit normal z, by summing the quantiser's cells."""
    inner, signs = _cells(stored)
    normal = NormalDist()
    mass = np.diff([0.0, *map(normal.cdf, inner), 1.0])
    first = -np.diff([0.0, *map(normal.pdf, inner), 0.0])
    return (signs * mass) @ signs.T, signs @ first


def _cells(stored: int) -> tuple[np.ndarray, np.ndarray]:
    """Inner borders of the quantiser [2^b - 1] and t of every plane and cell [b, 2^b]."""
    cells = 2**stored
    inner = STEP[stored] * (np.arange(1, cells) - cells // 2)
    shifts = np.arange(stored - 1, -1, -1)[:, None]
    return inner, 2.0 * (np.arange(cells) >> shifts & 1) - 1
