"""What `kvstore bench quality` found, as tables, as JSON and as a picture."""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from kvstore_client.projections.coarse_to_fine import CoarseToFine
from kvstore_client.projections.quality import Quality
from kvstore_client.projections.rows import CodecRow

LENGTHS = (1024, 32_768, 131_072)
"""Of the sessions whose bits are told with their own means and bases."""
SETTING = ("title", "from_token", "seed")


@dataclass(frozen=True)
class Line:
    """One row of the table: what it costs and, in bits a number, what it stores, `at` sessions of so many tokens."""

    quality: Quality
    code: float
    scales: float
    at: dict[int, float]

    @classmethod
    def of(cls, row: CodecRow, quality: Quality) -> "Line":
        bits = row.bits()
        return cls(quality, bits.code, bits.scales, {tokens: row.bits_at(tokens) for tokens in LENGTHS})


@dataclass(frozen=True)
class Stored:
    """A projection that rows may name."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Report:
    """What was found in one setting, on these devices."""

    setting: dict[str, object]
    devices: tuple[str, ...]
    projections: dict[str, Stored]
    lines: dict[str, Line] = field(default_factory=dict)
    needles: dict[str, dict[tuple[int, float], float]] = field(default_factory=dict)
    coarse: dict[tuple[str, int], CoarseToFine] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "Report":
        """The rows of a table that was written as JSON; ValueError if it is none."""
        try:
            table = json.loads(file.read_text())
            setting = {name: table[name] for name in SETTING}
            projections = {name: Stored(**stored) for name, stored in table["projections"].items()}
            lines = {row["row"]: _line(row) for row in table["rows"]}
            return cls(setting, tuple(table["devices"]), projections, lines)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{file.name} is no table of bench quality") from None

    def after(self, other: "Report") -> "Report":
        """With the other's rows before its own; ValueError, naming what differs, if they are not of one setting."""
        theirs = {**other.setting, **other.projections}
        for name, ours in {**self.setting, **self.projections}.items():
            if theirs.get(name, ours) != ours:
                raise ValueError(f"a table is of a run with {name} {theirs[name]}, this one has {ours}")
        return replace(
            self,
            devices=tuple(dict.fromkeys([*other.devices, *self.devices])),
            projections=other.projections | self.projections,
            lines=other.lines | self.lines,
        )

    @property
    def title(self) -> str:
        return f"{self.setting['title']}, {', '.join(self.devices)}"

    def quality_table(self) -> Table:
        table = Table(title=self.title)
        for heading in ("row", "code + scales", *(f"at {n:,}" for n in LENGTHS), "of fp16"):
            table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
        for heading in ("perplexity", "KL", "top-1 same", "output error"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, line in self.lines.items():
            found = line.quality
            table.add_row(
                name,
                f"{line.code:.3g} + {line.scales:.2g}",
                *(f"{line.at[tokens]:.2f}" for tokens in LENGTHS),
                f"{(line.code + line.scales) / 16:.3f}",
                f"{found.perplexity_rise:+.2%}",
                f"{found.kl:.4f}",
                f"{found.top1:.3f}",
                f"{found.output_error:.3f}" if found.output_error else "",
            )
        if self.lines:
            exact = next(iter(self.lines.values())).quality.perplexity_exact
            table.add_row("exact", "16", *["16.00"] * len(LENGTHS), "1", f"{exact:.3f}", "0", "1", "0")
        return table

    def level_table(self) -> Table | None:
        """KL of rows at a level beside that of coding so many bits directly."""
        table = Table(title="levels: KL against coding so many bits directly")
        for heading in ("row", "KL", "direct", "ratio"):
            table.add_column(heading, justify="left" if heading == "row" else "right")
        for name, direct in self._levels().items():
            ours, theirs = self.lines[name].quality.kl, self.lines[direct].quality.kl
            table.add_row(f"{name} / {direct}", f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.3f}")
        return table if table.row_count else None

    def _levels(self) -> dict[str, str]:
        """Rows that read a level to the rows that store no more."""
        found = {}
        for name in self.lines:
            head, _, level = name.partition("@")
            if level:
                kinds, codec, bits, *basis = head.split(":")
                direct = ":".join([kinds, codec, f"{float(bits) - int(level):g}", *basis])
                if direct in self.lines:
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
        rows = [
            {"row": name, **asdict(line.quality), "code": line.code, "scales": line.scales, "bits_at": line.at}
            for name, line in self.lines.items()
        ]
        needles = [
            {"row": name, "length": length, "depth": depth, "found": share}
            for name, hits in self.needles.items()
            for (length, depth), share in hits.items()
        ]
        coarse = [
            {"row": name, "oversampling": oversampling, **asdict(found)}
            for (name, oversampling), found in self.coarse.items()
        ]
        stored = {name: asdict(projection) for name, projection in self.projections.items()}
        of = {**self.setting, "devices": self.devices, "projections": stored}
        report = {**of, "rows": rows, "needles": needles, "coarse_to_fine": coarse}
        file.write_text(json.dumps(report, indent=1) + "\n")


def write_pareto(file: Path, report: Report) -> None:
    """KL by stored bits a number, both logarithmic, a panel for each of keys, values and both; lines join a codec's."""
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, line in report.lines.items():
        kind, codec, _, *basis = name.split(":")
        if "@" not in name:
            points = series.setdefault(" ".join([codec, *basis]), {}).setdefault(kind, [])
            points.append((line.code + line.scales, line.quality.kl))
    kinds = [kind for kind in ("keys", "values", "both") if any(kind in each for each in series.values())]
    figure = Figure(figsize=(5.2 * len(kinds), 5.2), layout="constrained")
    panels = dict(zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True))
    drawn: dict[str, Any] = {}
    for number, (label, by_kind) in enumerate(series.items()):
        style = {"matryoshka": "-", "projected": "--"}.get(label.split()[0], ":")
        colour = colormaps["tab20"](number % 20)  # the same in each panel; matplotlib's cycle has fewer
        for kind, points in by_kind.items():
            drawn[label], *_ = panels[kind].plot(
                *zip(*sorted(points), strict=True), style, color=colour, marker="o", markersize=3, linewidth=1
            )
    for kind, axes in panels.items():
        axes.set(title=kind, xlabel="bits a number, with scales", ylabel="KL of the next token")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    figure.legend(drawn.values(), drawn.keys(), fontsize=7, loc="outside lower center", ncols=6)
    figure.suptitle(report.title, size=9)
    figure.savefig(file, dpi=150)


def _line(row: dict[str, Any]) -> Line:
    quality = Quality(**{each.name: row[each.name] for each in fields(Quality)})
    return Line(quality, row["code"], row["scales"], {int(tokens): bits for tokens, bits in row["bits_at"].items()})
