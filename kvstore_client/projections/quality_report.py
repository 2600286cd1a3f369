"""What `kvstore bench quality` found, as tables, as JSON and as a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from rich.table import Table

from kvstore_client.projections.coarse_to_fine import CoarseToFine
from kvstore_client.projections.quality import Quality
from kvstore_client.projections.rows import CodecRow

LENGTHS = (1024, 32_768, 131_072)
"""Of the sessions whose bits are told with their own means and bases."""


@dataclass(frozen=True)
class Report:
    setting: dict[str, object]
    rows: dict[str, CodecRow]
    quality: dict[str, Quality] = field(default_factory=dict)
    needles: dict[str, dict[tuple[int, float], float]] = field(default_factory=dict)
    coarse: dict[tuple[str, int], CoarseToFine] = field(default_factory=dict)

    def quality_table(self) -> Table:
        table = Table(title=str(self.setting["title"]))
        for heading in ("row", "code + scales", *(f"at {n:,}" for n in LENGTHS), "of fp16"):
            table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
        for heading in ("perplexity", "KL", "top-1 same", "output error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, found in self.quality.items():
            bits, row = self.rows[name].bits(), self.rows[name]
            table.add_row(
                name,
                f"{bits.code:.3g} + {bits.scales:.2g}",
                *(f"{row.bits_at(tokens):.2f}" for tokens in LENGTHS),
                f"{bits.total / 16:.3f}",
                f"{found.perplexity_rise:+.2%}",
                f"{found.kl:.4f}",
                f"{found.top1:.3f}",
                f"{found.output_error:.3f}" if found.output_error else "",
            )
        if self.quality:
            exact = next(iter(self.quality.values())).perplexity_exact
            table.add_row("exact", "16", *["16.00"] * len(LENGTHS), "1", f"{exact:.3f}", "0", "1", "0")
        return table

    def level_table(self) -> Table | None:
        """KL of rows at a level beside that of coding so many bits directly."""
        table = Table(title="levels: KL against coding so many bits directly")
        for heading in ("row", "KL", "direct", "ratio"):
            table.add_column(heading, justify="left" if heading == "row" else "right")
        for name, direct in self._levels().items():
            ours, theirs = self.quality[name].kl, self.quality[direct].kl
            table.add_row(f"{name} / {direct}", f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.3f}")
        return table if table.row_count else None

    def _levels(self) -> dict[str, str]:
        """Rows that read a level to the rows that store no more."""
        found = {}
        for name, row in self.rows.items():
            head, _, level = name.partition("@")
            if level:
                kinds, codec, bits, *basis = head.split(":")
                direct = ":".join([kinds, codec, f"{float(bits) - row.level:g}", *basis])
                if name in self.quality and direct in self.quality:
                    found[name] = direct
        return found

    def needle_table(self) -> Table | None:
        if not self.needles:
            return None
        places = sorted(next(iter(self.needles.values())))
        table = Table(title="planted facts found, by length and depth")
        table.add_column("row", no_wrap=True)
        for heading in (*(f"{length:,} at {depth:g}" for length, depth in places), "all"):
            table.add_column(heading, justify="right")
        for name, hits in self.needles.items():
            shares = [hits[place] for place in places]
            table.add_row(name, *(f"{share:.2f}" for share in shares), f"{sum(shares) / len(shares):.3f}")
        return table

    def coarse_table(self) -> Table | None:
        table = Table(title="best 64 of a coarse pass")
        for heading in ("row", "oversampling", "recall", "recall of exact keys", "bytes read"):
            table.add_column(heading, justify="left" if heading == "row" else "right")
        for (name, oversampling), found in self.coarse.items():
            figures = (f"{share:.3f}" for share in (found.recall, found.recall_exact, found.bytes_read))
            table.add_row(name, str(oversampling), *figures)
        return table if self.coarse else None

    def write_json(self, file: Path) -> None:
        rows = []
        for name, found in self.quality.items():
            row = self.rows[name]
            at = {str(tokens): row.bits_at(tokens) for tokens in LENGTHS}
            rows.append({"row": name, **asdict(found), **asdict(row.bits()), "bits_at": at})
        needles = [
            {"row": name, "length": length, "depth": depth, "found": share}
            for name, hits in self.needles.items()
            for (length, depth), share in hits.items()
        ]
        coarse = [
            {"row": name, "oversampling": oversampling, **asdict(found)}
            for (name, oversampling), found in self.coarse.items()
        ]
        report = {**self.setting, "rows": rows, "needles": needles, "coarse_to_fine": coarse}
        file.write_text(json.dumps(report, indent=1) + "\n")


def write_pareto(file: Path, title: str, rows: Mapping[str, tuple[float, float]]) -> None:
    """KL by stored bits a number, both logarithmic, a panel for each of keys, values and both; lines join a codec's."""
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    kinds = [kind for kind in ("keys", "values", "both") if any(name.startswith(kind) for name in rows)]
    figure = Figure(figsize=(5.2 * len(kinds), 4.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # more lines than the default has colours
        for name, point in rows.items():
            of_kind, codec, _, *basis = name.split(":")
            if of_kind == kind and "@" not in name:
                lines.setdefault(" ".join([codec, *basis]), []).append(point)
        for label, points in lines.items():
            style = {"matryoshka": "-", "projected": "--"}.get(label.split()[0], ":")
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, linewidth=1, label=label)
        axes.set(title=kind, xlabel="bits a number, with scales", ylabel="KL of the next token")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.suptitle(title, size=9)
    figure.savefig(file, dpi=150)


def read_quality(file: Path, setting: Mapping[str, object]) -> dict[str, Quality]:
    """Rows of a table that was written as JSON; ValueError, naming what differs, if it was measured in another way."""
    try:
        table = json.loads(file.read_text())
        names = {each.name for each in fields(Quality)}
        rows = {row["row"]: Quality(**{name: row[name] for name in names}) for row in table["rows"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file.name} is no table of bench quality") from None
    for name, ours in setting.items():
        if _differ(table.get(name), ours):
            raise ValueError(f"{file.name} is of a run with {name} {table.get(name)}, this one has {ours}")
    return rows


def _differ(theirs: object, ours: object) -> bool:
    """Of what is told by projection, the first one's, which rows need not name, and what both have."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return theirs != ours
    return list(theirs)[:1] != list(ours)[:1] or any(theirs[name] != ours[name] for name in theirs.keys() & ours.keys())
