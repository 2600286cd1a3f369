"""`kvstore loadtest`: many workers, one shared context, requests at a rate that does not wait for answers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError, Session
from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.open_loop import poisson_arrivals, send
from kvstore_client.loadtest.report import Result, result_of, table_of, write_json
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import Tally
from kvstore_client.loadtest.workers import AttendWorker, fill, queries

SESSION_TTL_SECONDS = 3600.0
"""Beyond the load itself: for a session that this process could not delete."""
REFRESH_SECONDS = 0.25


def run(load: Load, *, slo: list[str] | None = None, json_file: Path | None = None) -> int:
    """Prints the table; 0 if every SLO (p99=20ms) was kept and every query asked twice got one answer, else 1.

    ValueError for an SLO that cannot be read, KVStoreError if the session cannot be made.
    """
    slos = [Slo.parse(text) for text in slo or []]
    console = Console()
    result = asyncio.run(measure(load, slos, console))
    console.print(table_of(result))
    if json_file is not None:
        write_json(result, json_file)
    return 0 if result.passed else 1


async def measure(load: Load, slos: list[Slo], console: Console) -> Result:
    """Fills a session, attends to it, deletes it. KVStoreError if the server does not do any of that."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tally, arrivals = Tally(), poisson_arrivals(load.rate, load.seconds, load.seed)
    async with AsyncKVStoreClient(load.target) as client, _temporary_session(client, load) as session:
        with Progress(*columns, console=console) as bars:
            appending = bars.add_task("append", total=load.tokens)
            await fill(session, load.tokens, load.seed, lambda done: bars.update(appending, completed=done))
            elapsed = await _attend(load, session.name, arrivals, tally, bars)
        return result_of(
            load,
            tally,
            device=(await client.server_info()).device,
            codec=(await session.info()).codec,
            sent=len(arrivals),
            elapsed_seconds=elapsed,
            slos=slos,
        )


async def _attend(load: Load, name: str, arrivals: list[float], tally: Tally, bars: Progress) -> float:
    """Every worker has a connection of its own. Nothing is retried, so that every failure is seen."""
    async with AsyncExitStack() as opened:
        workers: list[AttendWorker] = []
        for _ in range(load.workers):
            client = await opened.enter_async_context(AsyncKVStoreClient(load.target, retry=NO_RETRY))
            rows = queries(load.shape, load.seed)
            workers.append(AttendWorker(await client.open_session(name), rows, load.timeout_seconds, tally))
        # The session is on its device, and every stream is open, before time counts.
        await asyncio.gather(*(worker.warm_up() for worker in workers))
        task = bars.add_task("attend", total=len(arrivals))
        watching = asyncio.create_task(_watch(bars, task, tally))
        try:
            elapsed = await send([worker.request for worker in workers], arrivals, tally)
            await asyncio.gather(*(worker.finish() for worker in workers))
        finally:
            watching.cancel()
            _show(bars, task, tally)
    return elapsed


async def _watch(bars: Progress, task: TaskID, tally: Tally) -> None:
    while True:
        _show(bars, task, tally)
        await asyncio.sleep(REFRESH_SECONDS)


def _show(bars: Progress, task: TaskID, tally: Tally) -> None:
    p50, p99 = (tally.percentile(percent) * 1e3 for percent in (50, 99))
    text = f"attend: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {tally.errors.total()} errors"
    bars.update(task, completed=tally.finished, description=text)


@asynccontextmanager
async def _temporary_session(client: AsyncKVStoreClient, load: Load) -> AsyncIterator[Session]:
    name = f"loadtest-{uuid4().hex[:12]}"
    session = await client.create_session(name, load.shape, ttl_seconds=load.seconds + SESSION_TTL_SECONDS)
    try:
        yield session
    finally:
        with suppress(KVStoreError):  # then it expires
            await session.delete()
