"""`kvstore projections fit` and `kvstore bench quality`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from kvstore_client.demo.messages import Unusable
from kvstore_client.demo.model import load
from kvstore_client.integrations.model_shape import shape_of
from kvstore_client.projections.fit import gather, projection_of
from kvstore_client.projections.quality import Quality, measure
from kvstore_client.projections.rows import CodecRow
from kvstore_client.projections.show import show
from kvstore_client.projections.texts import sequences
from kvstore_codecs.artifact import Metric, Projection, read_projection
from kvstore_codecs.describe import Bits
from kvstore_kernels.backend import cpu_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "smollm2"


def fit(
    model: str, text: Path, out: Path, *, metric: Metric, length: int, count: int, skip: int, max_position: int | None
) -> None:
    """Writes a projection fitted on `count` sequences of `length` tokens of `text`; ValueError as projection_of."""
    console = Console(stderr=True)
    network, tokenizer = _loaded(model, console)
    texts = sequences(text, tokenizer, length, count, skip)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=count)
        gatherer = gather(network, texts, lambda done: progress.update(task, completed=done))
    data = projection_of(network, gatherer, texts, metric, length if max_position is None else max_position)
    out.write_bytes(data)
    show(out)


def quality(
    model: str,
    text: Path,
    rows: Sequence[str],
    *,
    projection: Path | None,
    length: int,
    count: int,
    skip: int,
    from_token: int,
    json_file: Path | None,
) -> None:
    """Prints the table of these rows; ValueError for a row that is none."""
    console = Console(stderr=True)
    network, tokenizer = _loaded(model, console)
    given = None if projection is None else read_projection(projection.read_bytes())
    made = {row: CodecRow.parse(row, shape_of(network), given, cpu_backend()) for row in rows}
    texts = sequences(text, tokenizer, length, count, skip)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=count * len(made))
        found = measure(
            network, texts, made, from_token=from_token, done=lambda done: progress.update(task, completed=done)
        )
    bits = {name: row.bits() for name, row in made.items()}
    Console().print(_table(found, bits), highlight=False)
    print(f"{count} x {length} tokens of {text.name} from token {skip}, {_named(given)}")
    if json_file is not None:
        report = [{"row": name, **asdict(found[name]), **asdict(bits[name])} for name in found]
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def _table(found: dict[str, Quality], bits: dict[str, Bits]) -> Table:
    table = Table()
    for heading in ("row", "bits: code + scales", "perplexity", "KL", "top-1 same"):
        table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=True)
    for name, row in found.items():
        table.add_row(
            name,
            f"{bits[name].code:.3g} + {bits[name].scales:.2g}",
            f"{row.perplexity_rise:+.2%}",
            f"{row.kl:.4f}",
            f"{row.top1:.3f}",
        )
    exact = next(iter(found.values())).perplexity_exact
    table.add_row("exact", "", f"{exact:.3f}", "0", "1")
    return table


def _named(projection: Projection | None) -> str:
    return "no projection" if projection is None else f"projection {projection.sha256[:12]}"


def _loaded(model: str, console: Console) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The demo's model, or a transformers model by its folder or name; in float32."""
    if model == DEMO_MODEL:
        try:
            return load(lambda: console.print("converting the model, once"))
        except Unusable as error:
            raise ValueError(str(error)) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return network.eval(), AutoTokenizer.from_pretrained(model)
