"""`make up-local` and `make down-local`: one stack a checkout, in the foreground."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ..project_rules import ROOT
from .stack import Part, Plan, Stack

FOLDER = ROOT / ".venv" / "local"
"""Of the stack that is up: settings, logs, `parts.json` once all are ready. It is removed with it."""
LOOK_SECONDS = 0.5
DOWN_SECONDS_MAX = 120.0
RESTARTS_MAX = 20

app = typer.Typer(add_completion=False, help="The whole service as plain processes, on loopback.")
console = Console(highlight=False, soft_wrap=True)


@app.command()
def up(
    replicas: Annotated[int, typer.Option(min=1, max=16)] = 2,
    store: Annotated[Literal["folder", "s3"], typer.Option(help="s3: a test server, in memory")] = "folder",
    data: Annotated[Path | None, typer.Option(help="The store, to stay; else it goes at the end")] = None,
    envoy_port: Annotated[int, typer.Option(help="0 takes a free one")] = 7700,
    prometheus_port: Annotated[int, typer.Option(help="0 takes a free one")] = 9090,
) -> None:
    """Start everything, say what runs where, and stop it all on Ctrl-C, SIGTERM or `down`."""
    with _only_one() as folder:
        stop = Stop()
        plan = Plan(folder, replicas, store, data and data.absolute(), envoy_port, prometheus_port)
        try:
            console.print("starting; where replicas never ran, half a minute goes into compiling")
            with Stack(plan, console.print) as stack:
                _list(stack)
                console.print(f"logs: {os.path.relpath(FOLDER)}; Ctrl-C or `make down-local` takes it down")
                stop.starting = False
                _watch(stack, stop.asked)
        except KeyboardInterrupt:
            pass
        except RuntimeError as error:
            _fail(str(error))
    console.print("all of it is down")


@app.command()
def down() -> None:
    """Stop what `up` has started in this checkout; exit 0 once it is gone."""
    give_up = time.monotonic() + DOWN_SECONDS_MAX
    asked = False
    while (pid := _holder()) is not None:
        if not asked:
            console.print(f"asking process {pid} to take it down")
            os.kill(pid, signal.SIGTERM)
            asked = True
        if time.monotonic() > give_up:
            _fail(f"process {pid} is still there after {DOWN_SECONDS_MAX:g} s; killed, it takes all along")
        time.sleep(0.1)
    if (FOLDER / "lock").exists():  # of one that was killed
        shutil.rmtree(FOLDER)
    console.print("down" if asked else "nothing is up")


@contextmanager
def _only_one() -> Generator[Path]:
    """The folder, empty and locked for as long as this process lives; it is gone afterwards."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    with (FOLDER / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _fail(f"it is up already (process {_holder()}): make down-local")
        _empty()  # of what a killed one left
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield FOLDER
        finally:
            _empty()
            (FOLDER / "lock").unlink()  # last: without it `down` takes this for gone
            FOLDER.rmdir()


def _empty() -> None:
    for left in FOLDER.iterdir():
        if left.name != "lock":
            shutil.rmtree(left) if left.is_dir() else left.unlink()


class Stop:
    """Signals that end it. What starts is interrupted by the first one, what watches and stops by none."""

    def __init__(self) -> None:
        self.asked, self.starting = threading.Event(), True
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked.set()
        if self.starting:
            self.starting = False
            raise KeyboardInterrupt


def _holder() -> int | None:
    """The process that holds the folder; a number that a dead one left behind is nobody's."""
    try:
        with (FOLDER / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int((FOLDER / "lock").read_text() or 0) or None
    return None


def _list(stack: Stack) -> None:
    _write(parts := stack.parts())
    table = Table(box=None)
    for name in ("", "address", "pid", ""):
        table.add_column(name, justify="right" if name == "pid" else "left")
    for part in parts:
        table.add_row(part.name, part.address, str(part.pid), part.what)
    console.print(table)


def _write(parts: list[Part]) -> None:
    """At once, for whoever reads it meanwhile."""
    new = FOLDER / "parts.new"
    new.write_text(json.dumps([asdict(part) for part in parts]))
    new.replace(FOLDER / "parts.json")


def _watch(stack: Stack, stop: threading.Event) -> None:
    """Until `stop`. Replicas that end are started again, as compose does; RuntimeError when that is in vain."""
    restarts = 0
    while not stop.wait(LOOK_SECONDS):
        if stack.restart_what_died():
            restarts += 1
            _write(stack.parts())
        if restarts > RESTARTS_MAX:
            raise RuntimeError(f"replicas have ended {restarts} times")


def _fail(text: str) -> NoReturn:
    console.print(text, style="red")
    raise typer.Exit(1)


app()
