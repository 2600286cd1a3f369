"""The highest rate at which every bound is kept, by doubling and then halving the gap."""

from collections.abc import Callable
from math import inf, isinf

RESOLUTION = 0.1
TRIALS_MAX = 16


def highest_rate(keeps: Callable[[float], bool], first: float) -> float:
    """A rate that `keeps` its bounds, of which RESOLUTION more does not, as far as TRIALS_MAX trials tell; 0: none.

    Noise may make a rate fail that would pass again: what is returned has passed.
    """
    best, worst, rate = 0.0, inf, first
    for _ in range(TRIALS_MAX):
        if keeps(rate):
            best = rate
        else:
            worst = rate
        if isinf(worst):
            rate = 2 * best
        elif worst - best <= RESOLUTION * worst:
            break
        else:
            rate = (best + worst) / 2
    return best
