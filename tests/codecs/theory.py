"""Closed forms of the variance of sign sketches for unit vectors at cosine rho, with blocks of d orthonormal rows.

A sketch of several blocks, the last perhaps cut short, is a mean of independent estimates, weighted by their rows.
"""

import math
from collections.abc import Callable

from kvstore_codecs.planes import mean_magnitude


def norm_rule(rho: float, rows: int, d: int) -> float:
    """alpha = sqrt(pi/2)/m |k|: exact for Haar blocks, up to a constant that is 1 + 1/(4 d) too large."""
    a = mean_magnitude(d)

    def block(part: int) -> float:
        spread = (1 - rho**2) * (1 - 2 / math.pi * (part - 1) / (d - 1))
        return math.pi / 2 / part * (spread + rho**2 * (1 + 2 / math.pi * (part - 1) - part * d * a * a))

    return _mixed(block, rows, d)


def ip_rule(rho: float, rows: int, stored: int, d: int) -> float:
    """A level of `rows` rows with the scale that makes all `stored` rows exact along k."""
    spread = _mixed(lambda part: (math.pi / 2 * d / part - 1) / (d - 1), rows, d)
    shared = sum(
        read / rows * part / stored * norm_rule(1, part, d)
        for read, part in zip(_parts(rows, d), _parts(stored, d), strict=False)
    )
    along = norm_rule(1, rows, d) + norm_rule(1, stored, d) - 2 * shared
    return (1 - rho**2) * spread + rho**2 * along


def gaussian(rho: float, rows: int) -> float:
    """Independent Gaussian rows and the norm rule."""
    return (math.pi / 2 - rho**2) / rows


def _mixed(block: Callable[[int], float], rows: int, d: int) -> float:
    return sum((part / rows) ** 2 * block(part) for part in _parts(rows, d))


def _parts(rows: int, d: int) -> list[int]:
    return [d] * (rows // d) + [rows % d] * (rows % d > 0)
