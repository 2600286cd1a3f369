"""`kvstore projections train` and `search`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kvstore_server.commands.arguments import CountOption, LengthOption, ModelOption, SkipOption, explained

StartOption = Annotated[Path, typer.Option(help="A projection to begin with", exists=True, dir_okay=False)]
OutOption = Annotated[Path, typer.Option(help="The file to write")]
StateOption = Annotated[Path | None, typer.Option(help="Where progress is kept; a run that finds it goes on there")]
DeviceOption = Annotated[str, typer.Option(help="cpu or cuda")]
InputOption = Annotated[Path, typer.Option(help="A text file; with sft JSON lines", exists=True, dir_okay=False)]
BudgetOption = Annotated[list[float] | None, typer.Option(help="Bits a number, or share of coordinates; repeatable")]
CodecOption = Annotated[Literal["matryoshka", "projected"], typer.Option(help="Whose sketches")]


def train(
    text: InputOption,
    projection: StartOption,
    out: OutOption,
    codec: CodecOption = "matryoshka",
    mode: Annotated[Literal["cpt", "sft"], typer.Option(help="Text, or prompt and response with adapters")] = "cpt",
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Texts a step")] = 1,
    budget: BudgetOption = None,
    kl_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of the loss; 0.25 with cpt, else 0; 1 to stay close to the model"),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0)] = 1e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: ModelOption = "smollm2",
    length: LengthOption = 1024,
    count: CountOption = 8,
    skip: SkipOption = 0,
    device: DeviceOption = "cpu",
    state: StateOption = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between reports and checkpoints")] = 100,
) -> None:
    """Train the bases and means of a projection with gradients through the model."""
    with explained():
        from kvstore_client.projections.train_commands import Run
        from kvstore_client.projections.train_commands import train as run
        from kvstore_client.projections.training import BUDGETS, TrainingSettings

        share = kl_share if kl_share is not None else 0.25 if mode == "cpt" else 0.0
        settings = TrainingSettings(
            codec, steps, tuple(budget or BUDGETS[codec]), share, learning_rate, batch=batch, seed=seed
        )
        run(Run(model, text, length, count, skip, device), projection, out, mode, settings, state, every)


def search(
    text: InputOption,
    projection: StartOption,
    out: OutOption,
    budget: BudgetOption = None,
    codec: CodecOption = "matryoshka",
    start: Annotated[Literal["water-filling", "full"], typer.Option(help="Where the search begins")] = "water-filling",
    step: Annotated[int, typer.Option(min=1, help="Words or coordinates that a head moves by")] = 1,
    floor: Annotated[int, typer.Option(min=0, help="What every head keeps")] = 0,
    at_once: Annotated[int, typer.Option(min=1, help="From full: heads lowered a sweep")] = 1,
    sweeps: Annotated[int, typer.Option(min=1, help="From water-filling: sweeps for one budget, at most")] = 4,
    model: ModelOption = "smollm2",
    length: LengthOption = 1024,
    count: CountOption = 2,
    skip: SkipOption = 0,
    device: DeviceOption = "cpu",
    state: StateOption = None,
) -> None:
    """Search for what each head keeps under a budget, by the KL of the next token."""
    with explained():
        from kvstore_client.projections.search import SearchSettings
        from kvstore_client.projections.train_commands import Run, find

        settings = SearchSettings(codec, tuple(budget or ()), start, step, floor, at_once, sweeps)
        find(Run(model, text, length, count, skip, device), projection, out, settings, state)
