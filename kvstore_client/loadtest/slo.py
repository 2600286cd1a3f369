"""Bounds on latency percentiles, written p99=20ms."""

import re
from dataclasses import dataclass

PATTERN = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)=(\d+(?:\.\d+)?)(us|ms|s)", re.ASCII)
UNIT_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Slo:
    """`percent` of all requests are answered within `seconds`."""

    text: str
    percent: float
    seconds: float

    @classmethod
    def parse(cls, text: str) -> "Slo":
        if (match := PATTERN.fullmatch(text)) is None:
            raise ValueError(f"{text!r} is not a bound such as p99=20ms (units us, ms, s)")
        percent, amount, unit = match.groups()
        return cls(text, float(percent), float(amount) * UNIT_SECONDS[unit])
