"""What a load test found, as plain values and as JSON."""

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from kvstore_client.loadtest.failover import Kill
from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import REFUSED, Kind, Tally

PERCENTILES = (50.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Row:
    """Requests of one kind. Percentiles are seconds by their names, infinite where too many requests failed."""

    kind: str
    answered: int
    refused: int
    failed: dict[str, int]
    percentiles: dict[str, float]

    @classmethod
    def of(cls, name: str, kind: Kind) -> "Row":
        failed = {code: count for code, count in sorted(kind.errors.items()) if code != REFUSED}
        percentiles = {f"p{percent:g}": kind.percentile(percent) for percent in PERCENTILES}
        return cls(name, kind.answered, kind.errors[REFUSED], failed, percentiles)


@dataclass(frozen=True)
class Moment:
    """What was due in one interval, `at_seconds` its middle."""

    at_seconds: float
    answered: int
    failed: int
    p50: float
    p99: float
    highest: float


@dataclass(frozen=True)
class Result:
    """One load and what came of it; rates are requests a second, bytes payload a second."""

    load: Load
    device: str
    codec: str
    seconds: float
    """From the first request until the last was finished."""
    offered_rate: float
    achieved_rate: float
    rows: list[Row]
    """One a kind, `all` last."""
    wire_bytes_per_second: float
    raw_bytes_per_second: float
    facts: dict[str, int]
    slos: dict[str, bool]
    kills: list[Kill]
    moments: list[Moment]

    @property
    def total(self) -> Row:
        return self.rows[-1]

    @property
    def passed(self) -> bool:
        return self.total.answered > 0 and not self.facts.get("wrong") and all(self.slos.values())


def result_of(
    load: Load,
    tally: Tally,
    *,
    device: str,
    codec: str,
    sent: int,
    elapsed_seconds: float,
    slos: list[Slo],
    kills: list[Kill],
) -> Result:
    seconds = max(elapsed_seconds, load.seconds)
    kinds = [Row.of(name, kind) for name, kind in sorted(tally.kinds.items())]
    total = Row.of("all", tally.all)
    return Result(
        load=load,
        device=device,
        codec=codec,
        seconds=seconds,
        offered_rate=sent / load.seconds,
        achieved_rate=total.answered / seconds,
        rows=[*kinds, total],
        wire_bytes_per_second=tally.facts["wire_bytes"] / seconds,
        raw_bytes_per_second=tally.facts["raw_bytes"] / seconds,
        facts=dict(tally.facts),
        slos={slo.text: slo.is_kept(tally) for slo in slos},
        kills=kills,
        moments=[_moment(number, tally) for number in sorted(tally.intervals)],
    )


def _moment(number: int, tally: Tally) -> Moment:
    kind = tally.intervals[number]
    at = (number + 0.5) * tally.interval_seconds
    p50, p99 = (kind.percentile(percent) for percent in (50, 99))
    return Moment(at, kind.answered, kind.errors.total(), p50, p99, kind.histogram.get_max_value() / 1e6)


def write_json(result: Result, file: Path) -> None:
    """Infinite percentiles become null: JSON has no infinity."""
    document = asdict(result) | {"passed": result.passed}
    file.write_text(json.dumps(_plain(document), indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
