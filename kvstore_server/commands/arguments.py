"""Arguments that several commands have, and what is said of wrong ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

TargetOption = Annotated[str, typer.Option(help="host:port of a server", envvar="KVSTORE_TARGET")]
TARGET = "127.0.0.1:7700"
ModelOption = Annotated[str, typer.Option(help="smollm2 (the demo's), or a transformers model's folder")]
TextOption = Annotated[Path, typer.Option(help="A text file", exists=True, dir_okay=False)]
LengthOption = Annotated[int, typer.Option(min=64, help="Tokens of one sequence")]
CountOption = Annotated[int, typer.Option(min=1, help="Sequences")]
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda:0: torch's device")]
SkipOption = Annotated[int, typer.Option(min=0, help="Tokens of the text before the first sequence")]


@contextmanager
def explained() -> Iterator[None]:
    """What is wrong with an argument, or is not installed, without a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        text = f"{error.name} is not installed: pip install 'remote-kv-store[train]'"
        raise typer.BadParameter(text) from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
