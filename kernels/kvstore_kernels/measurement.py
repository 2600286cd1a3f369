"""What a benchmark reports: one line a measurement, as a table, as JSON and as a picture."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table


@dataclass(frozen=True)
class Measurement:
    """`ratio` is to the peer or ceiling that `peer` names, of the same run."""

    name: str
    shape: str
    value: float
    unit: str
    ratio: float | None = None
    peer: str = ""


def table_of(title: str, measurements: Sequence[Measurement]) -> Table:
    table = Table(title=title)
    for heading in ("what", "shape", "", "", "ratio", "to"):
        table.add_column(heading, justify="right" if heading in ("", "ratio") else "left")
    for each in measurements:
        ratio = "" if each.ratio is None else f"{each.ratio:.2f}"
        table.add_row(each.name, each.shape, f"{each.value:,.4g}", each.unit, ratio, each.peer)
    return table


def write_json(file: Path, device: str, measurements: Sequence[Measurement]) -> None:
    rows = [asdict(each) for each in measurements]
    file.write_text(json.dumps({"device": device, "commit": _commit(), "measurements": rows}, indent=1) + "\n")


def write_chart(file: Path, title: str, measurements: Sequence[Measurement]) -> None:
    """Bars of every measurement that has a ratio, on a logarithmic axis, with the peer's 1 as a line."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    compared = [each for each in measurements if each.ratio]
    figure = Figure(figsize=(9, 0.9 + 0.32 * len(compared)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{each.name}, {each.shape}\nof {each.peer}" for each in compared]
    bars = axes.barh(names, [each.ratio or 0.0 for each in compared], color="#4477aa")
    axes.bar_label(bars, labels=[f" {each.ratio:.2f}  ({each.value:,.4g} {each.unit})" for each in compared], size=7)
    axes.axvline(1, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(x=0.35)
    axes.invert_yaxis()
    axes.set_title(title, size=9)
    axes.tick_params(labelsize=7)
    figure.savefig(file, dpi=150)


def _commit() -> str:
    """Of the working tree this runs from, if it is one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
