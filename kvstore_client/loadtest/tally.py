"""What became of every request: latencies, failures, bytes, answers that were wrong."""

from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import Any

from hdrh.histogram import HdrHistogram

HIGHEST_MICROSECONDS = 3_600_000_000
DIGITS, INTERVAL_DIGITS = 3, 2
REFUSED = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Done:
    """One answered request: its payload on the wire, both ways, and the KV bytes as the model holds them that it read
    or wrote there; `right` None: not checked."""

    wire_bytes: int = 0
    raw_bytes: int = 0
    right: bool | None = None


def _histogram(digits: int) -> HdrHistogram:
    return HdrHistogram(1, HIGHEST_MICROSECONDS, digits)


@dataclass
class Kind:
    """Requests of one kind: latencies of answers (1 us to 1 h) and failures by code."""

    histogram: HdrHistogram = field(default_factory=lambda: _histogram(DIGITS))
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def answered(self) -> int:
        return self.histogram.get_total_count()

    @property
    def finished(self) -> int:
        return self.answered + self.errors.total()

    def percentile(self, percent: float) -> float:
        """Seconds within which `percent` of all requests were answered; one that failed counts as never answered."""
        if not self.finished:
            return inf
        share = percent * self.finished / self.answered if self.answered else inf
        return inf if share > 100 else self.histogram.get_value_at_percentile(share) / 1e6


class Tally:
    """Requests by kind, and all of them by when they were due: one interval is `interval_seconds`."""

    def __init__(self, interval_seconds: float = 1.0) -> None:
        self.interval_seconds = interval_seconds
        self.kinds: dict[str, Kind] = {}
        self.intervals: dict[int, Kind] = {}
        self.facts: Counter[str] = Counter()
        """`wire_bytes`, `raw_bytes`, `checked`, `wrong`, and what a scenario counts beyond."""

    @property
    def all(self) -> Kind:
        together = Kind()
        for kind in self.kinds.values():
            together.histogram.add(kind.histogram)
            together.errors += kind.errors
        return together

    def answered(self, kind: str, due: float, seconds: float, done: Done) -> None:
        """`due`: seconds after the start at which the request was to be sent; `seconds`: from then to its answer."""
        microseconds = min(HIGHEST_MICROSECONDS, max(1, round(seconds * 1e6)))
        for each in (self._kind(kind), self._interval(due)):
            each.histogram.record_value(microseconds)
        self.facts["wire_bytes"] += done.wire_bytes
        self.facts["raw_bytes"] += done.raw_bytes
        if done.right is not None:
            self.check(done.right)

    def failed(self, kind: str, due: float, code: str) -> None:
        self._kind(kind).errors[code] += 1
        self._interval(due).errors[code] += 1

    def check(self, right: bool) -> None:
        """One answer was compared with what it must be."""
        self.facts["checked"] += 1
        self.facts["wrong"] += not right

    def add(self, other: "Tally") -> None:
        for kind, tally in other.kinds.items():
            _add(self._kind(kind), tally)
        for number, tally in other.intervals.items():
            _add(self._interval((number + 0.5) * self.interval_seconds), tally)
        self.facts += other.facts

    def packed(self) -> dict[str, Any]:
        """As plain values, for a pipe."""
        return {
            "interval_seconds": self.interval_seconds,
            "kinds": {name: (kind.histogram.encode(), dict(kind.errors)) for name, kind in self.kinds.items()},
            "intervals": {n: (each.histogram.encode(), dict(each.errors)) for n, each in self.intervals.items()},
            "facts": dict(self.facts),
        }

    @classmethod
    def unpacked(cls, packed: dict[str, Any]) -> "Tally":
        tally = cls(packed["interval_seconds"])
        for name in ("kinds", "intervals"):
            for key, (encoded, errors) in packed[name].items():
                getattr(tally, name)[key] = Kind(HdrHistogram.decode(encoded), Counter(errors))
        tally.facts = Counter(packed["facts"])
        return tally

    def _kind(self, name: str) -> Kind:
        if name not in self.kinds:
            self.kinds[name] = Kind()
        return self.kinds[name]

    def _interval(self, due: float) -> Kind:
        number = int(due / self.interval_seconds)
        if number not in self.intervals:
            self.intervals[number] = Kind(_histogram(INTERVAL_DIGITS))
        return self.intervals[number]


def _add(to: Kind, other: Kind) -> None:
    to.histogram.add(other.histogram)
    to.errors += other.errors
