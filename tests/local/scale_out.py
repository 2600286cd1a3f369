"""`make bench-scale-out`: one, two and three replicas behind Envoy, what operations cost, how far that carries."""

import asyncio
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.main import measure
from kvstore_client.loadtest.slo import Slo

from .limits import Replica, demand
from .scale_out_report import Capacity, Found, picture, print_tables
from .stack import Plan, Stack
from .work import SHAPE, Work, measured, metric, redis_ceilings

FLEETS = (1, 3, 10, 30, 100, 300)
WORKERS, TOKENS, FIRST_RATE = 9, 4096, 100.0
SLO = "p99=100ms"
WIDTH = 118

app = typer.Typer(add_completion=False)


@app.command()
def scale_out(
    replicas: Annotated[int, typer.Option(min=0, max=8, help="Measure 1 to so many; 0: only what operations cost")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Of each trial")] = 5.0,
    attends: Annotated[float, typer.Option(help="Steps a second of a replica on a GPU")] = Replica.attends,
    append_tokens: Annotated[int, typer.Option(help="Tokens of one append of it")] = Replica.append_tokens,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw both")] = None,
) -> None:
    """Attends of 1 to N replicas behind Envoy, metadata and objects of operations, and what 100 replicas would ask."""
    console = Console(highlight=False, width=WIDTH)
    capacities = [_capacity(count, seconds, console) for count in range(1, replicas + 1)]
    work, ceilings = _work(console)
    one = Replica(attends=attends, append_tokens=append_tokens)
    by_name = {each.name: each for each in work}
    found = Found(capacities, work, ceilings, one, [demand(by_name, ceilings, one, count) for count in FLEETS])
    print_tables(found, console)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(found), indent=1) + "\n")
    if png is not None:
        png.write_bytes(picture(found))


def _capacity(replicas: int, seconds: float, console: Console) -> Capacity:
    """The highest rate of Attend steps at which SLO is kept, every worker at a session of its own."""
    console.print(f"{replicas} replica{'s' * (replicas > 1)} behind Envoy")
    with _folder() as folder, Stack(Plan(Path(folder), replicas, prometheus_port=None)) as stack:
        wanted = {"model": SHAPE, "tokens": TOKENS, "workers": WORKERS, "rate": FIRST_RATE, "seconds": seconds}
        load = Load((stack.envoy.address,), "private", **wanted)
        result, _, _ = asyncio.run(measure(load, [Slo.parse(SLO)], console, find_capacity=True))
        steps = [metric(each, "kvstore_attend_steps_total") for each in stack.replicas.metrics]
    p50, p99 = (result.total.percentiles[name] for name in ("p50", "p99"))
    if not result.passed:
        raise RuntimeError(f"{replicas} replicas keep {SLO} at no rate, or answer wrongly: {result.facts}")
    console.print(f"{replicas}: {result.achieved_rate:,.1f} steps/s, p99 {p99 * 1e3:.1f} ms")
    return Capacity(replicas, result.achieved_rate, p50, p99, max(steps) / sum(steps), result.facts["checked"])


def _work(console: Console) -> tuple[list[Work], dict[str, float]]:
    console.print("what operations ask of Redis and of the store, two replicas over a bucket")
    with _folder() as folder, Stack(Plan(Path(folder), store="s3", prometheus_port=None)) as stack:
        return asyncio.run(measured(stack)), redis_ceilings(stack)


def _folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="kvstore-scale-")


if __name__ == "__main__":
    app()
