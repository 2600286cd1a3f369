"""`kvstore projections fit` and `kvstore bench quality`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress

from kvstore_client.demo.messages import Unusable
from kvstore_client.demo.model import load
from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections.coarse_to_fine import coarse_to_fine
from kvstore_client.projections.fit import gather, projection_of
from kvstore_client.projections.needles import needles, recall
from kvstore_client.projections.quality import measure
from kvstore_client.projections.quality_report import Line, Report, Stored, write_pareto
from kvstore_client.projections.rows import CodecRow
from kvstore_client.projections.show import show
from kvstore_client.projections.texts import sequences
from kvstore_codecs.artifact import Metric, read_projection
from kvstore_kernels.backend import cpu_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2"


def fit(
    model: str,
    text: Path,
    out: Path,
    *,
    metric: Metric,
    length: int,
    count: int,
    skip: int,
    max_position: int | None,
    device: str = "cpu",
) -> None:
    """Writes a projection fitted on `count` sequences of `length` tokens of `text`; ValueError as projection_of."""
    console = Console(stderr=True)
    network, tokenizer = loaded(model, device, console)
    texts = sequences(text, tokenizer, length, count, skip)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=count)
        gatherer = gather(network, texts, lambda done: progress.update(task, completed=done))
    data = projection_of(network, gatherer, texts, metric, length if max_position is None else max_position)
    out.write_bytes(data)
    show(out)


@dataclass(frozen=True)
class Wanted:
    """What `kvstore bench quality` measures: `count` sequences of `length` tokens of `text` from `skip` on.

    `direct`: by the ops alone, on `device`. `needles` facts are planted at every depth of texts of `needle_lengths`.
    `tables` were written by such runs: their rows are not measured again.
    """

    model: str
    text: Path
    rows: Sequence[str]
    projections: Mapping[str, Path]
    length: int
    count: int
    skip: int
    from_token: int
    direct: bool
    device: str
    needles: int
    needle_lengths: Sequence[int]
    needle_rows: Sequence[str]
    seed: int
    tables: Sequence[Path] = ()


def quality(wanted: Wanted, json_file: Path | None, plot: Path | None) -> None:
    """Prints the tables of these rows; ValueError for a row that is none, or what cannot be measured so."""
    if not wanted.direct and wanted.device != "cpu":
        raise ValueError("a device is for the ops alone: with --direct")
    console = Console(stderr=True)
    network, tokenizer = loaded(wanted.model, wanted.device, console)
    files = {name: file.read_bytes() for name, file in wanted.projections.items()}
    known = {name: read_projection(data) for name, data in files.items()}
    stored = {name: Stored(projection.sha256, len(files[name])) for name, projection in known.items()}
    before = Report(_setting(wanted), (), {})
    for file in wanted.tables:
        before = Report.read(file).after(before)
    named = list(dict.fromkeys([*wanted.rows, *wanted.needle_rows]))
    shape, ops = shape_of(network), cpu_backend()
    made = {row: CodecRow.parse(row, shape, known, ops) for row in named}
    rows = {name: made[name] for name in wanted.rows if name not in before.lines}
    asked = {name: made[name] for name in wanted.needle_rows}
    texts = sequences(wanted.text, tokenizer, wanted.length, wanted.count, wanted.skip)
    coarse = {name: made[name] for name in wanted.rows if made[name].level and made[name].kinds == "keys"}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=wanted.count * len(rows))

        def done(count: int) -> None:
            progress.update(task, completed=count)

        if wanted.direct or not rows:
            found = measure(network, texts, rows, from_token=wanted.from_token, done=done)
        else:
            from kvstore_client.projections.served import measure_served  # the ops alone need no gRPC

            data = list(files.values())
            found = measure_served(network, texts, rows, data, from_token=wanted.from_token, done=done)
        hits: dict[str, dict[tuple[int, float], float]] = {}
        if wanted.needles:
            hay = sequences(wanted.text, tokenizer, max(wanted.needle_lengths) + 4096, 1, wanted.skip)[0]
            planted = needles(hay, tokenizer, wanted.needle_lengths, wanted.needles, wanted.seed)
            task = progress.add_task("asking", total=len(planted) * (1 + len(asked)))
            hits = recall(network, planted, asked, done)
        lines = {name: Line.of(rows[name], quality) for name, quality in found.items()}
        closer = coarse_to_fine(network, texts[0], coarse)
        report = Report(_setting(wanted), _devices(wanted, named), stored, lines, hits, closer).after(before)
    _print(report)
    if json_file is not None:
        report.write_json(json_file)
    if plot is not None:
        write_pareto(plot, report)


def _print(report: Report) -> None:
    console = Console(width=200)
    tables = report.quality_table(), report.level_table(), report.coarse_table(), report.needle_table()
    for table in tables:
        if table is not None:
            console.print(table, highlight=False)
    for name, stored in report.projections.items():
        print(f"projection {name}: {stored.bytes:,} bytes, once for all sessions")


def _setting(wanted: Wanted) -> dict[str, object]:
    how = "direct" if wanted.direct else "client and server"
    return {
        "title": f"{wanted.count} x {wanted.length} tokens of {wanted.text.name} from {wanted.skip}, {how}",
        "from_token": wanted.from_token,
        "seed": wanted.seed,
    }


def _devices(wanted: Wanted, measured: Sequence[str]) -> tuple[str, ...]:
    if not measured:
        return ()
    return ("CPU" if wanted.device == "cpu" else torch.cuda.get_device_name(wanted.device),)


def loaded(model: str, device: str, console: Console) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The demo's model, or a transformers model by its folder or name; in float32."""
    if model == DEMO_MODEL:
        try:
            network, tokenizer = load(lambda: console.print("converting the model, once"))
        except Unusable as error:
            raise ValueError(str(error)) from None
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
    return network.to(torch.device(device)), tokenizer  # pyright: ignore[reportArgumentType]
