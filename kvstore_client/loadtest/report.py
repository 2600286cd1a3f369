"""A load test's result, as a table and as JSON."""

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from rich.table import Table

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import Tally
from kvstore_codecs.spec import CodecSpec, KindCodec

PERCENTILES = (50.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True)
class Result:
    """Percentiles are seconds by their names, infinite where too many requests failed."""

    load: Load
    device: str
    codec: CodecSpec
    offered_rate: float
    achieved_rate: float
    answered: int
    percentiles: dict[str, float]
    errors: dict[str, int]
    verified: int
    mismatched: int
    slos: dict[str, bool]

    @property
    def passed(self) -> bool:
        return self.answered > 0 and not self.mismatched and all(self.slos.values())


def result_of(
    load: Load, tally: Tally, *, device: str, codec: CodecSpec, sent: int, elapsed_seconds: float, slos: list[Slo]
) -> Result:
    return Result(
        load=load,
        device=device,
        codec=codec,
        offered_rate=sent / load.seconds,
        achieved_rate=tally.answered / max(elapsed_seconds, load.seconds),
        answered=tally.answered,
        percentiles={f"p{percent:g}": tally.percentile(percent) for percent in PERCENTILES},
        errors=dict(sorted(tally.errors.items())),
        verified=tally.verified,
        mismatched=tally.mismatched,
        slos={slo.text: tally.percentile(slo.percent) <= slo.seconds for slo in slos},
    )


def write_json(result: Result, file: Path) -> None:
    """Infinite percentiles become null: JSON has no infinity."""
    percentiles = {name: value if isfinite(value) else None for name, value in result.percentiles.items()}
    codec = result.codec.model_dump(mode="json")
    document = asdict(result) | {"codec": codec, "percentiles": percentiles, "passed": result.passed}
    file.write_text(json.dumps(document, indent=2) + "\n")


def table_of(result: Result) -> Table:
    load = result.load
    table = Table(title=f"{load.workers} workers attend to one session of {load.tokens:,} tokens", show_header=False)
    table.add_row("server", f"{load.target}, {result.device}")
    table.add_row("session", f"{load.model}, keys {_codec(result.codec.keys)}, values {_codec(result.codec.values)}")
    table.add_row("offered", f"{result.offered_rate:,.1f}/s for {load.seconds:g} s, open loop, Poisson")
    table.add_row("achieved", f"{result.achieved_rate:,.1f}/s, {result.answered:,} answers")
    for name, seconds in result.percentiles.items():
        table.add_row(name, f"{seconds * 1e3:,.2f} ms" if isfinite(seconds) else "never: too many failed")
    table.add_row("errors", ", ".join(f"{code} {count:,}" for code, count in result.errors.items()) or "none")
    table.add_row("asked twice", f"{result.verified:,}, of them {result.mismatched:,} answered differently")
    for text, kept in result.slos.items():
        table.add_row(text, "kept" if kept else "MISSED", style="green" if kept else "red")
    return table


def _codec(codec: KindCodec) -> str:
    settings = codec.model_dump(exclude={"name"})
    return " ".join([codec.name, *(f"{name}={value}" for name, value in settings.items())])
