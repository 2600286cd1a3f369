"""What became of every request."""

from collections import Counter
from math import inf

from hdrh.histogram import HdrHistogram

HIGHEST_MICROSECONDS = 3_600_000_000
DIGITS = 3


class Tally:
    """Latencies of answers (an HDR histogram, 1 us to 1 h, three digits) and failures by code."""

    def __init__(self) -> None:
        self._histogram = HdrHistogram(1, HIGHEST_MICROSECONDS, DIGITS)
        self.errors: Counter[str] = Counter()
        self.verified = 0
        """Queries asked twice."""
        self.mismatched = 0
        """Those of them whose answers differed."""

    @property
    def answered(self) -> int:
        return self._histogram.get_total_count()

    @property
    def finished(self) -> int:
        return self.answered + self.errors.total()

    def record(self, seconds: float) -> None:
        self._histogram.record_value(min(HIGHEST_MICROSECONDS, max(1, round(seconds * 1e6))))

    def percentile(self, percent: float) -> float:
        """Seconds within which `percent` of all requests were answered; one that failed counts as never answered."""
        if not self.finished:
            return inf
        share = percent * self.finished / self.answered if self.answered else inf
        return inf if share > 100 else self._histogram.get_value_at_percentile(share) / 1e6
