"""A load test's result for people: one table, one picture, one page; and its histograms for other tools."""

from base64 import b64encode
from html import escape
from io import BytesIO
from math import isfinite
from pathlib import Path

from hdrh.log import HistogramLogWriter
from rich.table import Table

from kvstore_client.loadtest.load import SCENARIOS
from kvstore_client.loadtest.result import PERCENTILES, Result, Row
from kvstore_client.loadtest.tally import Tally

MINOR_LABELS_RATIO = 20
"""Of the highest latency drawn to the lowest, from which on labels between the powers of ten would not find room."""
NEVER = "never"
"""For a percentile beyond which requests failed."""


def headings() -> list[str]:
    return ["", "answered", "refused", "failed", *(f"p{percent:g} ms" for percent in PERCENTILES)]


def cells(row: Row) -> list[str]:
    failed = ", ".join(f"{code} {count:,}" for code, count in row.failed.items()) or "0"
    latencies = (f"{seconds * 1e3:,.2f}" if isfinite(seconds) else NEVER for seconds in row.percentiles.values())
    return [row.kind, f"{row.answered:,}", f"{row.refused:,}", failed, *latencies]


def title(result: Result) -> str:
    return f"{result.load.scenario}: {SCENARIOS[result.load.scenario]}"


def facts(result: Result) -> list[tuple[str, str]]:
    """What the table has below its rows: a name and what there is to say."""
    load, found = result.load, result.facts
    arrivals = "a trace's arrivals" if load.trace else "Poisson"
    workers = f"{load.workers} workers in {load.processes} process{'es' * (load.processes > 1)}"
    wrong = found.get("wrong", 0)
    queried = "" if load.scenario in ("ingest", "trace") else f"{load.tokens:,} tokens, "
    lines = [
        ("server", f"{', '.join(load.targets)}, {result.device}"),
        ("sessions", f"{load.model}, {queried}{result.codec}"),
        ("offered", f"{result.offered_rate:,.1f}/s for {load.seconds:g} s, open loop, {arrivals}, {workers}"),
        ("achieved", f"{result.achieved_rate:,.1f}/s in {result.seconds:.1f} s"),
        ("payload", f"{result.wire_bytes_per_second / 1e9:,.4g} GB/s on the wire"),
        ("raw", f"{result.raw_bytes_per_second / 1e9:,.4g} GB/s of {load.shape.dtype} keys and values read or written"),
        ("checked", f"{found.get('checked', 0):,} answers, {wrong:,} WRONG" if wrong else _checked(found)),
    ]
    if prompt := found.get("prompt_tokens", 0):
        lines.append(("prefixes", f"{found.get('matched_tokens', 0) / prompt:.3f} of {prompt:,} prompt tokens found"))
    for kill in result.kills:
        text = f"kill -9 at {kill.at_seconds:.1f} s, serving again after {kill.back_after_seconds:.1f} s"
        lines.append((f"replica {kill.replica}", text))
    return [*lines, *((text, "kept" if kept else "MISSED") for text, kept in result.slos.items())]


def _checked(found: dict[str, int]) -> str:
    return f"{found.get('checked', 0):,} answers, all as they must be"


def table_of(result: Result) -> Table:
    table = Table(title=title(result), caption_justify="left")
    for name in headings():
        table.add_column(name, justify="right" if name else "left")
    for row in result.rows:
        table.add_row(*cells(row), style="bold" if row is result.total else None)
    lines = facts(result)
    width = 2 + max(len(name) for name, _ in lines)
    table.caption = "\n".join(f"{name:<{width}}{text}" for name, text in lines)
    return table


def write_hdr_log(tally: Tally, begun_unix_seconds: float, file: Path) -> None:
    """An HdrHistogram log: one histogram of microseconds an interval, for the tools that read such logs."""
    with file.open("w") as opened:
        log = HistogramLogWriter(opened)
        log.output_log_format_version()
        log.output_comment(f"[StartTime: {begun_unix_seconds:.3f} (seconds since epoch)]")
        log.output_base_time(begun_unix_seconds * 1000)
        log.output_legend()
        for number in sorted(tally.intervals):
            histogram = tally.intervals[number].histogram
            histogram.set_start_time_stamp(1000 * number * tally.interval_seconds)
            histogram.set_end_time_stamp(1000 * (number + 1) * tally.interval_seconds)
            log.output_interval_histogram(histogram, max_value_unit_ratio=1000.0)


def picture(result: Result) -> bytes:
    """A PNG: latency over time, and what was answered and what failed. Needs matplotlib."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    from matplotlib.ticker import StrMethodFormatter  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    at = [moment.at_seconds for moment in result.moments]
    for name, label in (("highest", "highest"), ("p99", "p99"), ("p50", "p50")):
        values = [getattr(moment, name) * 1e3 for moment in result.moments]
        drawn = [value if isfinite(value) and value > 0 else float("nan") for value in values]
        upper.plot(at, drawn, label=label, marker=".", markersize=3, linewidth=1)
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    lowest, highest = upper.get_ylim()
    upper.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}" if highest < MINOR_LABELS_RATIO * lowest else ""))
    upper.set_ylabel("ms from when it was due")
    width = at[1] - at[0] if len(at) > 1 else 1.0
    lower.bar(at, [moment.answered / width for moment in result.moments], width, color="#88aacc", label="answered")
    lower.bar(at, [moment.failed / width for moment in result.moments], width, color="#cc3311", label="failed")
    lower.set_ylabel("requests/s")
    lower.set_xlabel("seconds after the start at which a request was due")
    for axes in (upper, lower):
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)  # beside what is drawn
        for kill in result.kills:
            axes.axvline(kill.at_seconds, color="#cc3311", linestyle="--", linewidth=0.8)
        axes.grid(visible=True, linewidth=0.3)
    upper.set_title(f"{title(result)}\n{result.load.model}, {result.codec}, {result.device}", fontsize=9)
    made = BytesIO()
    figure.savefig(made, format="png", dpi=120)
    return made.getvalue()


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px system-ui,sans-serif;margin:2em;max-width:62em}}table{{border-collapse:collapse;margin:1em 0}}
td,th{{padding:.25em .8em;border-bottom:1px solid #ccc;text-align:right}}
td:first-child,th:first-child,.facts td{{text-align:left}}img{{max-width:100%}}</style></head>
<body><h1>{title}</h1><table>{head}{rows}</table><table class="facts">{facts}</table>
<img alt="latency over time" src="data:image/png;base64,{image}"></body></html>
"""


def page(result: Result) -> str:
    """One HTML file with everything in it."""

    def line(tag: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts) + "</tr>\n"

    return PAGE.format(
        title=escape(title(result)),
        head=line("th", headings()),
        rows="".join(line("td", cells(row)) for row in result.rows),
        facts="".join(line("td", [name, text]) for name, text in facts(result)),
        image=b64encode(picture(result)).decode(),
    )
