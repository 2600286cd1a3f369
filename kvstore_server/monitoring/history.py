"""The metrics of the last minutes, so that a page can show rates and percentiles without a monitoring system."""

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from time import time

from prometheus_client import CollectorRegistry

PERIOD_SECONDS = 5.0
MOMENTS_MAX = 120
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Moment:
    """All samples at one time, by name and sorted labels."""

    unix_seconds: float
    samples: Mapping[tuple[str, Labels], float]

    @classmethod
    def now(cls, registry: CollectorRegistry, before: "Moment | None" = None) -> "Moment":
        """Shares names and labels, most of what a moment takes, with the one `before`."""
        known = {} if before is None else {key: key for key in before.samples}
        found: dict[tuple[str, Labels], float] = {}
        for sample in (sample for family in registry.collect() for sample in family.samples):
            key = sample.name, tuple(sorted(sample.labels.items()))
            found[known.get(key, key)] = sample.value
        return cls(time(), found)

    def each(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and value of every sample of that name."""
        for (found, labels), value in self.samples.items():
            if found == name:
                yield dict(labels), value

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with these labels among theirs; 0 if there is none."""
        wanted = labels.items()
        return sum(value for found, value in self.each(name) if wanted <= found.items())


class History:
    """The latest MOMENTS_MAX moments, oldest first, PERIOD_SECONDS apart."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.moments: deque[Moment] = deque(maxlen=MOMENTS_MAX)

    def note(self) -> None:
        """Adds the present moment."""
        self.moments.append(Moment.now(self._registry, self.moments[-1] if self.moments else None))

    async def run(self) -> None:
        """Notes moments until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            self.note()

    def rates(self, name: str, **labels: str) -> list[float]:
        """Of a counter, a second, between moments that follow each other."""
        pairs = pairwise(list(self.moments))
        return [
            max(0.0, b.total(name, **labels) - a.total(name, **labels)) / (b.unix_seconds - a.unix_seconds)
            for a, b in pairs
        ]

    def percentiles(self, name: str, share: float, **labels: str) -> list[float]:
        """Of a histogram, between moments that follow each other; nan where nothing was observed."""
        return [percentile(a, b, name, share, **labels) for a, b in pairwise(list(self.moments))]


def percentile(before: Moment | None, after: Moment, name: str, share: float, **labels: str) -> float:
    """The value below which `share` of a histogram's observations between two moments lie, within its buckets."""
    counts: dict[float, float] = {}
    for moment, sign in ((before, -1), (after, 1)):
        for found, value in () if moment is None else moment.each(f"{name}_bucket"):
            if labels.items() <= found.items():
                bound = float(found["le"])
                counts[bound] = counts.get(bound, 0.0) + sign * value
    total = counts.get(inf, 0.0)
    if total <= 0:
        return nan
    lower, below = 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= share * total:
            inside = count - below
            return lower if bound == inf else lower + (bound - lower) * (share * total - below) / inside
        lower, below = bound, count
    return lower
