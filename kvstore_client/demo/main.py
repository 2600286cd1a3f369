"""`kvstore demo`: one long context, read once, kept by the store, and shared by workers that never held it."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from kvstore_client.demo.bars import Bars
from kvstore_client.demo.messages import Answered, Compared, Continued, Plan, Prefilled, Progress, Unusable
from kvstore_client.demo.model import check_installed
from kvstore_client.demo.processes import WorkerFailed, WorkerProcess, results
from kvstore_client.demo.server import ServerFailed, ServerProcess
from kvstore_client.demo.setting import ANSWER_TOKENS, COMPARED_TOKENS, TOKENS
from kvstore_client.demo.table import Outcome, broken_promises, table_of
from kvstore_client.demo.text import SharedText, shared_text
from kvstore_client.demo.workers import answer, prefill_and_compare

STAGE_SECONDS = 600.0
"""A stage that takes longer is taken for stuck."""


def run(text: Path | None = None) -> int:
    """Shares `text` (default: docstrings of the standard library); 0 if it showed what was promised, else 1."""
    console = Console()
    # Idle threads that spin would take the cores from the other processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # So that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        check_installed()
        with TemporaryDirectory(prefix="kvstore-demo-") as folder:
            outcome = _demonstrate(shared_text(text), Path(folder), console)
    except (OSError, ServerFailed, UnicodeDecodeError, Unusable, WorkerFailed) as error:
        console.print(f"demo: {error}", style="red", highlight=False)
        return 1
    console.print(table_of(outcome))
    return 1 if broken_promises(outcome) else 0


def _demonstrate(text: SharedText, folder: Path, console: Console) -> Outcome:
    with ExitStack() as ended:
        bars = ended.enter_context(Bars(console))
        server = ServerProcess(folder)
        ended.callback(server.stop)
        plan = Plan(
            target=server.target,
            lossy_session="demo",
            raw_session="demo-raw",
            text=text.body,
            tokens=TOKENS,
            compared=COMPARED_TOKENS,
        )

        def worker(name: str, target: Callable[..., None], *arguments: object) -> WorkerProcess:
            process = WorkerProcess(name, target, *arguments)
            ended.callback(process.end)
            return process

        _start(server, bars)
        reader = worker("worker 1", prefill_and_compare, plan)
        (prefilled,) = results([reader], Prefilled, STAGE_SECONDS, bars.show)
        half = ANSWER_TOKENS // 2
        asker = worker("worker 2", answer, plan, text.questions[0], half, ANSWER_TOKENS - half)
        other = worker("worker 3", answer, plan, text.questions[1], ANSWER_TOKENS, 0)
        answers = results([asker, other], Answered, STAGE_SECONDS, bars.show)
        other.end()
        server.kill()
        restart_seconds = _start(server, bars)
        asker.pipe.send("go on")
        (continued,) = results([asker], Continued, STAGE_SECONDS, bars.show)
        asker.end()
        reader.pipe.send("go on")
        (compared,) = results([reader], Compared, STAGE_SECONDS, bars.show)
    return Outcome(text, prefilled, answers[0], answers[1], continued, restart_seconds, compared)


def _start(server: ServerProcess, bars: Bars) -> float:
    bars.show("server", Progress("start", 0, None))
    seconds = server.start()
    bars.show("server", Progress("start", 1, 1))
    return seconds
