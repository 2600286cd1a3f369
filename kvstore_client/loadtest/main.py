"""`kvstore loadtest`: sessions are made, processes put load on them, everything is measured, checked and deleted."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from kvstore_client import AsyncKVStoreClient, Session
from kvstore_client.demo.messages import Progress
from kvstore_client.demo.processes import WorkerProcess, results
from kvstore_client.loadtest.capacity import highest_rate
from kvstore_client.loadtest.failover import Kill, Replicas, replicas
from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.report import page, picture, table_of, write_hdr_log
from kvstore_client.loadtest.result import Result, result_of, write_json
from kvstore_client.loadtest.sessions import Run, prepared
from kvstore_client.loadtest.share import Go, Ready, Share, Snapshot, serve
from kvstore_client.loadtest.slo import Slo
from kvstore_client.loadtest.tally import Tally
from kvstore_codecs.named import name_of
from kvstore_codecs.spec import CodecSpec

SESSION_TTL_SECONDS = 3600.0
"""For sessions that this process could not delete; they are used as long as it lives."""
READY_SECONDS = 600.0
FILE_COLUMNS = 120
"""Of a log or a file, so that no number of the table is cut."""
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass(frozen=True)
class Files:
    """Where to write what, if anywhere."""

    json: Path | None = None
    hdr: Path | None = None
    png: Path | None = None
    html: Path | None = None


def run(load: Load, slos: list[Slo], *, find_capacity: bool = False, files: Files = Files()) -> int:
    """Prints the table; 0 if every bound was kept and every answer was what it must be, else 1.

    `find_capacity` searches the highest rate at which that holds. KVStoreError if the server does not do its part
    before the load.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, FILE_COLUMNS)
    result, tally, begun = asyncio.run(measure(load, slos, console, find_capacity=find_capacity))
    console.print(table_of(result), highlight=False)
    if files.json is not None:
        write_json(result, files.json)
    if files.hdr is not None:
        write_hdr_log(tally, begun, files.hdr)
    if files.png is not None:
        files.png.write_bytes(picture(result))
    if files.html is not None:
        files.html.write_text(page(result))
    return 0 if result.passed else 1


async def measure(
    load: Load, slos: list[Slo], console: Console, *, find_capacity: bool = False
) -> tuple[Result, Tally, float]:
    """Fills sessions, puts load on them, deletes them: the result, its tally and when the load began (unix seconds)."""
    with ExitStack() as opened:
        own = None
        if load.scenario == "failover":
            own = await asyncio.to_thread(opened.enter_context, replicas())
            load = replace(load, targets=own.targets)
        bars = opened.enter_context(Bars(*COLUMNS, console=console, transient=True))
        named = Run(f"loadtest-{uuid4().hex[:12]}", SESSION_TTL_SECONDS)
        target = load.targets[0] if len(load.targets) == 1 else load.targets
        async with AsyncKVStoreClient(target) as client:
            filling = bars.add_task("append", total=None, visible=False)

            def show(done: int, total: int) -> None:
                bars.update(filling, completed=done, total=total, visible=True)

            async with prepared(client, load, named, show) as session:
                device, codec = (await client.server_info()).device, await _codec_of(client, session, load)
                with Crew(load, named, own, bars) as crew:
                    loaded = await asyncio.to_thread(_loaded, crew, load, slos, find_capacity, console)
    rate, tally, shares, kills = loaded
    result = result_of(
        replace(load, rate=rate),
        tally,
        device=device,
        codec=codec,
        sent=sum(share.sent for share in shares),
        elapsed_seconds=max(share.elapsed_seconds for share in shares),
        slos=slos,
        kills=kills,
    )
    return result, tally, shares[0].begun_unix_seconds


Loaded = tuple[float, Tally, list[Share], list[Kill]]


def _loaded(crew: "Crew", load: Load, slos: list[Slo], find_capacity: bool, console: Console) -> Loaded:
    """One run at the load's rate, or the one at the highest rate that keeps every bound."""
    if not find_capacity:
        return crew.run(load.rate)
    kept: dict[float, Loaded] = {}

    def keeps(rate: float) -> bool:
        found = crew.run(rate)
        tally = found[1]
        fits = not tally.facts["wrong"] and all(slo.is_kept(tally) for slo in slos)
        p99 = tally.all.percentile(99) * 1e3
        console.print(f"{rate:,.1f}/s: p99 {p99:,.2f} ms, {'kept' if fits else 'missed'}", highlight=False)
        if fits or not kept:
            kept[rate if fits else 0.0] = found
        return fits

    return kept[highest_rate(keeps, load.rate)]


async def _codec_of(client: AsyncKVStoreClient, session: Session | None, load: Load) -> str:
    if session is not None:
        return name_of((await session.info()).codec)
    return name_of(load.spec or CodecSpec.model_validate_json((await client.server_info()).default_codec_json))


class Crew:
    """The processes of one load test, while it is entered."""

    def __init__(self, load: Load, named: Run, own: Replicas | None, bars: Bars) -> None:
        self._load, self._named, self._own, self._bars = load, named, own, bars
        self._processes: list[WorkerProcess] = []
        self._ready: list[Ready] = []

    def __enter__(self) -> "Crew":
        for number in range(self._load.processes):
            arguments = (self._load, self._named, number)
            self._processes.append(WorkerProcess(f"process {number}", serve, *arguments))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.end()

    def run(self, rate: float) -> Loaded:
        """One run of all processes together; the first waits until all are ready."""
        if not self._ready:
            self._ready = results(self._processes, Ready, READY_SECONDS, lambda *_: None)
        load = self._load
        with self._killing() as kills, self._shown(rate) as show:
            for process in self._processes:
                process.pipe.send(Go(rate, load.seconds))
            shares = results(self._processes, Share, 10 * load.seconds + READY_SECONDS, show)
        tally = Tally.unpacked(shares[0].packed)
        for share in shares[1:]:
            tally.add(Tally.unpacked(share.packed))
        return rate, tally, shares, kills

    def _killing(self) -> AbstractContextManager[list[Kill]]:
        return nullcontext(list[Kill]()) if self._own is None else self._own.killed(self._load.seconds)

    @contextmanager
    def _shown(self, rate: float) -> Iterator[Callable[[str, Progress], None]]:
        """A live line: what is finished, p50 and p99 so far, failures."""
        latest: dict[str, Snapshot] = {}
        task = self._bars.add_task(f"{rate:,.1f}/s", total=None)

        def show(process: str, progress: Progress) -> None:
            assert isinstance(progress, Snapshot)
            latest[process] = progress
            together = Tally()
            for each in latest.values():
                together.add(Tally.unpacked(each.packed))
            kind = together.all
            p50, p99 = (kind.percentile(percent) * 1e3 for percent in (50, 99))
            text = f"{rate:,.1f}/s: p50 {p50:.1f} ms, p99 {p99:.1f} ms, {kind.errors.total()} failed"
            total = sum(each.total or 0 for each in latest.values())
            self._bars.update(task, completed=kind.finished, total=total, description=text)

        yield show
