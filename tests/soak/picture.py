"""The gauges over time, as one picture and one table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .slopes import Slope


def draw(
    file: Path, title: str, seconds: Sequence[float], series: Mapping[str, Sequence[float]], warm_seconds: float
) -> None:
    """A PNG: one panel a gauge, from 0; grey until it counts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2
    rows = -(-len(series) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(11, 2.2 * rows), sharex=True, squeeze=False)
    minutes = [each / 60 for each in seconds]
    for panel, (gauge, values) in zip(panels.flat, series.items(), strict=False):
        panel.axvspan(0, warm_seconds / 60, color="0.92")
        panel.plot(minutes, values, linewidth=1.2)
        panel.set_title(gauge, fontsize=10, loc="left")
        panel.set_ylim(0, max(*values, 1) * 1.15)
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(series) :]:
        panel.axis("off")
    for panel in panels[-1]:
        panel.set_xlabel("minutes")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def table(slopes: Sequence[Slope]) -> list[str]:
    heading = f"{'gauge':<22}{'mean':>12}{'an hour':>12}{'rise':>10}{'allowed':>10}"
    rows = [
        f"{each.gauge:<22}{each.mean:>12,.1f}{each.per_hour:>+12,.1f}{each.rise:>+10.1f}{each.rise_max:>10.1f}"
        f"  {'flat' if each.flat else 'RISES'}"
        for each in slopes
    ]
    return [heading, *rows]
