"""Arguments that several commands have, and what is said of wrong ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvstore_client import KVStoreClient

TargetOption = Annotated[str, typer.Option(help="host:port of a server", envvar="KVSTORE_TARGET")]
TARGET = "127.0.0.1:7700"
ModelOption = Annotated[str, typer.Option(help="smollm2 (the demo's), or a transformers model's folder")]
TextOption = Annotated[Path, typer.Option(help="A text file", exists=True, dir_okay=False)]
LengthOption = Annotated[int, typer.Option(min=64, help="Tokens of one sequence")]
CountOption = Annotated[int, typer.Option(min=1, help="Sequences")]
WAIT_SECONDS = 2.0
"""From then on a command says that it waits for a server."""
DeviceOption = Annotated[str, typer.Option(help="cpu, or cuda:0: torch's device")]
SkipOption = Annotated[int, typer.Option(min=0, help="Tokens of the text before the first sequence")]


@contextmanager
def client_of(target: str) -> "Iterator[KVStoreClient]":
    """A client of the server at `target`, which may be about to start."""
    from kvstore_client import KVStoreClient

    waiting = Timer(WAIT_SECONDS, typer.echo, [f"waiting for {target}"], {"err": True})
    waiting.daemon = True
    waiting.start()
    try:
        with KVStoreClient(target) as client:
            yield client
    finally:
        waiting.cancel()


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
