"""The tables and the picture of `make bench-scale-out`."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO

from rich.console import Console
from rich.table import Table

from .limits import (
    CODEC,
    MODEL,
    PREFIX_READS_MAX,
    PREFIX_WRITES_MAX,
    Demand,
    Replica,
    append_seconds,
    replicas_within,
)
from .work import APPEND, Work


@dataclass(frozen=True)
class Capacity:
    """What so many replicas answered within the bound; `busiest` is the share of the busiest one."""

    replicas: int
    steps_per_second: float
    p50_seconds: float
    p99_seconds: float
    busiest: float
    checked: int


@dataclass(frozen=True)
class Found:
    capacities: list[Capacity]
    work: list[Work]
    ceilings: dict[str, float]
    """Of Redis, requests a second by redis-benchmark."""
    replica: Replica
    demands: list[Demand]


def print_tables(found: Found, console: Console) -> None:
    rows = [
        (f"{c.replicas}", f"{c.steps_per_second:,.0f}", _ms(c.p50_seconds), _ms(c.p99_seconds), f"{c.busiest:.2f}")
        for c in found.capacities
    ]
    headings = ("replicas", "steps/s", "p50 ms", "p99 ms", "share of the busiest")
    if rows:
        console.print(_table("Attend through Envoy, on the processors that all of it shares", headings, rows))
    headings = ("one", "Redis scripts", "Redis commands", "PUT", "GET", "LIST", "bytes put")
    work = [
        (w.name, *(f"{n:.2f}" for n in (w.scripts, w.commands, w.puts, w.gets, w.lists)), f"{w.put_bytes:,.0f}")
        for w in found.work
    ]
    console.print(_table("What it asks of Redis and of the store", headings, work))
    ceilings = [(name, f"{rate:,.0f}") for name, rate in found.ceilings.items()]
    console.print(_table("Redis by redis-benchmark", ("request", "a second"), ceilings))
    headings = ("replicas", "attends", "appends", "Redis requests", "of Redis", "PUT", "GET, LIST", "GB", "prefixes")
    one = found.replica
    title = f"A second of replicas on GPUs, each {one.attends:,.0f} steps and {one.appends:.1f} appends of "
    title += f"{one.append_tokens} tokens of {MODEL} as {CODEC}"
    console.print(_table(title, headings, map(_demand, found.demands)))
    for line in limits(found):
        console.print(line)


def limits(found: Found) -> list[str]:
    work = {each.name: each for each in found.work}
    one, ceilings, append = found.replica, found.ceilings, work[APPEND]
    return [
        f"one Redis takes {1 / append_seconds(work, ceilings):,.0f} appends a second, "
        f"and {replicas_within(work, ceilings, one):,} such replicas with {one.stored} stored sessions for each",
        f"one prefix of a bucket ({PREFIX_WRITES_MAX:,.0f} writes, {PREFIX_READS_MAX:,.0f} reads a second) takes "
        f"{min(PREFIX_WRITES_MAX / append.puts, PREFIX_READS_MAX / append.reads):,.0f} appends a second; every "
        "session's log is a prefix of its own",
    ]


def picture(found: Found) -> bytes:
    """A PNG: steps a second and p99 by replicas, and shares of the limits by replicas. Needs matplotlib."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts = [str(each.replicas) for each in found.capacities]
    bars = left.bar(counts, [each.steps_per_second for each in found.capacities], color="#88aacc")
    left.bar_label(bars, [f"p99 {_ms(each.p99_seconds)} ms" for each in found.capacities], size=8)
    left.set_ylabel("Attend steps a second")
    left.set_xlabel("replicas on shared processors")
    replicas = [each.replicas for each in found.demands]
    for name, values in (
        ("Redis's thread", [each.redis_busy for each in found.demands]),
        ("writes of one prefix", [each.store_writes / PREFIX_WRITES_MAX for each in found.demands]),
        ("reads of one prefix", [each.store_reads / PREFIX_READS_MAX for each in found.demands]),
    ):
        right.plot(replicas, values, marker=".", label=name)
    right.axhline(1, color="#cc3311", linewidth=0.8)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("replicas on GPUs (calculated)")
    right.set_ylabel("share of the limit")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(visible=True, axis="y", linewidth=0.3)
    made = BytesIO()
    figure.savefig(made, format="png", dpi=120)
    return made.getvalue()


def _demand(each: Demand) -> tuple[str, ...]:
    return (
        f"{each.replicas}",
        *(f"{n:,.0f}" for n in (each.attends, each.appends, each.redis_requests)),
        f"{each.redis_busy:.3f}",
        *(f"{n:,.0f}" for n in (each.store_writes, each.store_reads)),
        f"{each.store_bytes / 1e9:,.1f}",
        f"{each.prefixes}",
    )


def _table(title: str, headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
