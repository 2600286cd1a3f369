"""Whether gauges stay flat: a line through what was measured after the warm-up, and how far it rises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

ALLOWED = {
    "memory, MiB": 16.0,
    "descriptors": 6.0,
    "threads": 3.0,
    "rows in memory, MiB": 2.0,
    "kept to compare with, MiB": 2.0,
    "sessions in memory": 8.0,
    "sessions": 10.0,
    "objects in the store": 150.0,
}
"""How far each may rise from the end of the warm-up to the end: noise of a load that goes up and down."""


@dataclass(frozen=True)
class Slope:
    """`rise` of the least-squares line over the time that was looked at, and what it may be."""

    gauge: str
    mean: float
    per_hour: float
    rise: float
    rise_max: float

    @property
    def flat(self) -> bool:
        return self.rise <= self.rise_max


def slopes(seconds: Sequence[float], series: Mapping[str, Sequence[float]], warm_seconds: float) -> list[Slope]:
    """One of each gauge of ALLOWED. ValueError if fewer than four samples are left after the warm-up."""
    times = np.asarray(seconds)
    warm = times >= warm_seconds
    if warm.sum() < 4:
        raise ValueError(f"{warm.sum()} samples after {warm_seconds} s say nothing")
    found = []
    for gauge, rise_max in ALLOWED.items():
        values = np.asarray(series[gauge])[warm]
        per_second, _ = np.polyfit(times[warm], values, 1)
        rise = per_second * (times[-1] - times[warm][0])
        found.append(Slope(gauge, float(values.mean()), float(per_second * 3600), float(rise), rise_max))
    return found
