"""Worker processes that report over pipes, with a bound on every wait."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any, TypeVar

from kvstore_client.demo.messages import Progress, Unusable

T = TypeVar("T")
END_SECONDS = 5.0


class WorkerFailed(Exception):
    """A worker raised, died or took too long."""


class _Dismissed(Exception):
    """The parent wants nothing more."""


@dataclass(frozen=True)
class _Failure:
    text: str


class WorkerProcess:
    """`target(pipe, *arguments)` in a fresh interpreter. It sends Progress and results, and receives go-aheads."""

    def __init__(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(target, theirs, arguments), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def end(self) -> None:
        """Waits a moment for an orderly end."""
        self.pipe.close()
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(END_SECONDS)


def results(
    workers: Sequence[WorkerProcess], kind: type[T], seconds: float, show: Callable[[str, Progress], None]
) -> list[T]:
    """One result of `kind` from every worker, within `seconds`; progress goes to `show(worker name, progress)`."""
    deadline = monotonic() + seconds
    found: dict[str, T] = {}
    while missing := {worker.pipe: worker for worker in workers if worker.name not in found}:
        ready = wait(list(missing), max(0.0, deadline - monotonic()))
        if not ready:
            raise WorkerFailed(f"{', '.join(worker.name for worker in missing.values())}: no result in {seconds:g} s")
        for pipe, worker in missing.items():
            if pipe not in ready:
                continue
            message = _received(worker)
            if isinstance(message, Progress):
                show(worker.name, message)
            elif isinstance(message, kind):
                found[worker.name] = message
            else:
                raise WorkerFailed(f"{worker.name}: {message.text if isinstance(message, _Failure) else message}")
    return [found[worker.name] for worker in workers]


def await_go(pipe: "Connection[Any, Any]", seconds: float) -> None:
    """Blocks a worker until it is told to go on."""
    if not pipe.poll(seconds):
        raise TimeoutError(f"not told to go on within {seconds:g} s")
    try:
        pipe.recv()
    except EOFError as error:
        raise _Dismissed from error


def _received(worker: WorkerProcess) -> object:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise WorkerFailed(f"{worker.name} ended without a result") from error


def _main(target: Callable[..., None], pipe: "Connection[Any, Any]", arguments: tuple[Any, ...]) -> None:
    # An interrupt in the terminal reaches all processes; the parent ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(BrokenPipeError):
        try:
            target(pipe, *arguments)
        except _Dismissed:
            pass
        except Unusable as error:
            pipe.send(_Failure(str(error)))
        except Exception:
            pipe.send(_Failure(traceback.format_exc()))
