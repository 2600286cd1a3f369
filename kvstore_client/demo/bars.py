"""A progress bar for every task of every process; a line for each finished one where there is no terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from kvstore_client.demo.messages import Progress


class Bars:
    """Shown while it is entered; `show` is called with each Progress of a process."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._console = console
        self._bars = RichProgress(*columns, console=console, disable=not console.is_terminal)
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def show(self, process: str, progress: Progress) -> None:
        key = process, progress.task
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(f"{process}: {progress.task}", total=progress.total)
        self._bars.update(self._tasks[key], completed=progress.done, total=progress.total)
        if not self._console.is_terminal and progress.done == progress.total:
            self._console.print(f"{process}: {progress.task} done", highlight=False)
