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
from numpy.typing import NDArray

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
    moments, signs = _moments(stored), _signs(stored)[:read]
    gram, cross = (signs * moments[0]) @ signs.T, signs @ moments[1]
    fitted = np.array(plane_weights(stored)) if read == stored else np.round(np.linalg.solve(gram, cross), 6)
    return PlaneCode(tuple(fitted.tolist()), float(fitted @ cross), float(fitted @ gram @ fitted))


def level_weights(stored: int, read: int, d: int) -> tuple[float, ...]:
    """The weights of a level, times the mean ratio of the scale that it needs to the stored one.

    With X = <z, y> at the level and Y with all planes, z a random vector of length sqrt(d), that is 1 / E[X / Y], so
    that <x, x^> is right on average: to order 1 / d, E[Y] / E[X] on the sphere and what the covariances of X and Y
    add. Thresholds follow |z|, so only fluctuations that |z| does not explain count.
    """
    signs = _signs(stored)
    weights, full = plane_code(stored, read).weights, plane_code(stored, stored).weights
    y = np.stack([np.dot(weights, signs[:read]), np.dot(full, signs)])
    _, first, second, third = _moments(stored)
    gain, with_square = y @ first, y @ (third - first)
    covariance = (second * y) @ y.T - np.outer(gain, gain) - np.outer(with_square, with_square) / 2
    relative = covariance / np.outer(gain, gain)
    on_sphere = y @ _sphere_first_moments(stored, d)
    ratio = on_sphere[1] / on_sphere[0] / (1 + (relative[1, 1] - relative[0, 1]) / d)
    return tuple(round(float(ratio * weight), 6) for weight in weights)


def mean_magnitude(d: int) -> float:
    """E|u_1| of a uniform unit vector u in R^d: Gamma(d/2) / (sqrt(pi) Gamma((d+1)/2)), by its recurrence."""
    value, first = (1.0, 1) if d % 2 else (2 / math.pi, 2)
    for n in range(first, d, 2):
        value *= n / (n + 1)
    return value


def _borders(stored: int) -> NDArray[np.float64]:
    """Inner borders of the quantiser's cells [2^b - 1]."""
    return STEP[stored] * (np.arange(1, 2**stored) - 2 ** (stored - 1))


def _signs(stored: int) -> NDArray[np.float64]:
    """t of every plane and cell [b, 2^b]."""
    shifts = np.arange(stored - 1, -1, -1)[:, None]
    return 2.0 * (np.arange(2**stored) >> shifts & 1) - 1


def _moments(stored: int) -> NDArray[np.float64]:
    """E[z^k; z in cell] of a unit normal z for k = 0..3, [4, 2^b]."""
    z, normal = _borders(stored), NormalDist()
    below, density = np.array([normal.cdf(b) for b in z]), np.array([normal.pdf(b) for b in z])
    below_and_zero = np.stack([below, -density, below - z * density, -(z**2 + 2) * density])
    return np.diff(below_and_zero, prepend=0, append=np.array([[1.0], [0.0], [1.0], [0.0]]))


def _sphere_first_moments(stored: int, d: int) -> NDArray[np.float64]:
    """E[z; z in cell] of a coordinate of a random vector of length sqrt(d), [2^b]; its square has a Beta law."""
    tails = np.maximum(1 - _borders(stored) ** 2 / d, 0) ** ((d - 1) / 2) * (mean_magnitude(d) * math.sqrt(d) / 2)
    return -np.diff(tails, prepend=0, append=0)
