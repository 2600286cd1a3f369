"""Bounds on latency percentiles, written p99=20ms, or append:p99=200ms for one kind of request."""

import re
from dataclasses import dataclass

from kvstore_client.loadtest.tally import Kind, Tally

PATTERN = re.compile(r"(?:([a-z_]+):)?p(\d{1,2}(?:\.\d{1,3})?)=(\d+(?:\.\d+)?)(us|ms|s)", re.ASCII)
UNIT_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """`percent` of all requests (of one kind, if it is not empty) are answered within `seconds`."""

    text: str
    kind: str
    percent: float
    seconds: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        if (match := PATTERN.fullmatch(text)) is None:
            raise ValueError(f"{text!r} is not a bound such as p99=20ms or append:p99=200ms (units us, ms, s)")
        kind, percent, amount, unit = match.groups()
        return cls(text, kind or "", float(percent), float(amount) * UNIT_SECONDS[unit])

    def is_kept(self, tally: Tally) -> bool:
        """A kind of which there was no request is not."""
        kind = tally.kinds.get(self.kind, Kind()) if self.kind else tally.all
        return kind.percentile(self.percent) <= self.seconds
