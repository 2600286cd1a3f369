"""One process's share of a load test: its workers, asked by the parent to run at a rate, as often as it likes."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from time import time
from typing import Any

import torch

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError
from kvstore_client.demo.messages import Progress, Unusable
from kvstore_client.loadtest.checking import Expected, expected_of
from kvstore_client.loadtest.load import Load
from kvstore_client.loadtest.open_loop import Operation, poisson_arrivals, send
from kvstore_client.loadtest.operations import DISTINCT_QUERIES, Appending, Asking
from kvstore_client.loadtest.replay import Replay
from kvstore_client.loadtest.sessions import Run
from kvstore_client.loadtest.tally import Tally
from kvstore_client.loadtest.trace import read_trace
from kvstore_client.loadtest.vectors import Vectors, queries
from kvstore_client.retry import DEFAULT_RETRY

SNAPSHOT_SECONDS = 0.5
INTERVALS_MAX = 240
GO_SECONDS = 600.0
PREPARE_SECONDS = 60.0
"""Of one question asked while nothing else goes on: it may bring a session to its device."""
MIXED = ("attend",) * 8 + ("top_k", "append")


@dataclass(frozen=True)
class Ready:
    """The workers are connected and warm."""


@dataclass(frozen=True)
class Go:
    """Run once: `rate` requests a second, all processes together."""

    rate: float
    seconds: float


@dataclass(frozen=True)
class Snapshot(Progress):
    """How far a run is; `packed` is a Tally without intervals."""

    packed: dict[str, Any]


@dataclass(frozen=True)
class Share:
    """What came of one process's part of a run."""

    packed: dict[str, Any]
    begun_unix_seconds: float
    sent: int
    elapsed_seconds: float


Plan = tuple[list[tuple[int, float]], Callable[[int], Operation], Callable[[], Awaitable[None]]]
"""A process's arrivals, what each does, and what to wait for at the end."""


def serve(pipe: "Connection[Any, Any]", load: Load, run: Run, process: int) -> None:
    """What a process of the load test runs until its parent closes the pipe."""
    torch.set_num_threads(1)
    try:
        asyncio.run(_serve(pipe, load, run, process))
    except KVStoreError as error:
        raise Unusable(str(error)) from None


async def _serve(pipe: "Connection[Any, Any]", load: Load, run: Run, process: int) -> None:
    async with AsyncExitStack() as opened:
        part = Part(load, run, process)
        await part.open(opened)
        pipe.send(Ready())
        while (go := await asyncio.to_thread(_next, pipe)) is not None:
            pipe.send(await part.run(go, pipe.send))


def _next(pipe: "Connection[Any, Any]") -> Go | None:
    """None when the parent wants nothing more."""
    if not pipe.poll(GO_SECONDS):
        raise TimeoutError(f"not told what to do within {GO_SECONDS:g} s")
    with suppress(EOFError):
        return pipe.recv()
    return None


class Part:
    """The workers of one process."""

    def __init__(self, load: Load, run: Run, process: int) -> None:
        self._load, self._run, self._process = load, run, process
        self._workers = load.workers_of(process)
        self._shape = run.shape(load)
        self._rows = queries(self._shape, load.seed, DISTINCT_QUERIES)
        self._expected: dict[str, Expected] = {}
        self._asking: dict[int, Asking] = {}
        self._appending: dict[int, Appending] = {}
        self._clients: list[AsyncKVStoreClient] = []
        self._vectors: Vectors | None = None

    async def open(self, opened: AsyncExitStack) -> None:
        """Every worker has connections of its own, and its sessions are loaded before time counts."""
        load = self._load
        for worker in self._workers:
            retry = DEFAULT_RETRY if load.retries else NO_RETRY
            target = load.targets[0] if len(load.targets) == 1 else load.targets
            client = await opened.enter_async_context(AsyncKVStoreClient(target, retry=retry))
            self._clients.append(client)
            if (name := self._run.asked(load, worker)) is not None:
                self._asking[worker] = await self._asker(client, name)
            if (name := self._run.appended(load, worker)) is not None:
                session = await client.open_session(name)
                vectors = self._pool(load.append_tokens)
                self._appending[worker] = Appending(session, vectors, load.append_tokens, load.timeout_seconds)

    async def _asker(self, client: AsyncKVStoreClient, name: str) -> Asking:
        load, session = self._load, await client.open_session(name)
        top_k = load.top_k if load.scenario not in ("decode", "private") else 0
        attends = load.scenario != "retrieval"
        if name not in self._expected:
            self._expected[name] = await expected_of(
                session, self._rows, top_k=top_k, attends=attends, timeout=PREPARE_SECONDS
            )
        asking = Asking(session, self._rows, self._expected[name], top_k=load.top_k, timeout=load.timeout_seconds)
        if attends:
            await asking.attend(0, 0.0)  # opens this worker's own stream
        return asking

    def _pool(self, multiple: int) -> Vectors:
        if self._vectors is None:
            self._vectors = Vectors(self._shape, self._load.seed, multiple)
        return self._vectors

    async def run(self, go: Go, report: Callable[[Snapshot], None]) -> Share:
        tally = Tally(max(1.0, go.seconds / INTERVALS_MAX))
        arrivals, operation, finish = self._plan(go, tally)
        begun_unix = time()
        watching = asyncio.create_task(_watch(tally, len(arrivals), report))
        try:
            elapsed = await send(arrivals, operation, tally)
            await finish()
        finally:
            watching.cancel()
        for appending in self._appending.values():
            if (right := await appending.is_there()) is not None:
                tally.check(right)
        return Share(tally.packed(), begun_unix, len(arrivals), elapsed)

    def _plan(self, go: Go, tally: Tally) -> Plan:
        load, mine = self._load, set(self._workers)
        if load.trace is not None:
            return self._traced(go, tally)

        async def finish() -> None:
            return

        every = enumerate(poisson_arrivals(go.rate, go.seconds, load.seed))
        arrivals = [(number, due) for number, due in every if number % load.workers in mine]
        return arrivals, self._operation, finish

    def _operation(self, number: int) -> Operation:
        worker = number % self._load.workers
        kind = {"ingest": "append", "retrieval": "top_k", "decode": "attend", "private": "attend"}.get(
            self._load.scenario, MIXED[number // self._load.workers % len(MIXED)]
        )
        if kind == "append":
            return Operation(kind, self._appending[worker].append)
        asking = self._asking[worker]
        return Operation(kind, asking.attend if kind == "attend" else asking.top_k)

    def _traced(self, go: Go, tally: Tally) -> Plan:
        load = self._load
        assert load.trace is not None
        block = load.trace_block_tokens
        requests = read_trace(load.trace, speed=load.trace_speed, block_tokens=block, seconds=go.seconds)
        replay = Replay(
            self._clients,
            self._run.name,
            self._shape,
            load.spec,
            self._pool(block),
            block_tokens=block,
            rows=self._rows,
            ttl_seconds=self._run.ttl_seconds,
            timeout=load.timeout_seconds,
            tally=tally,
        )
        mine = range(self._process, len(requests), load.processes)

        def operation(number: int) -> Operation:
            return Operation("prompt", partial(replay.prompt, requests[number]))

        async def finish() -> None:
            while replay.decoding:
                await asyncio.gather(*replay.decoding)

        return [(number, requests[number].due) for number in mine], operation, finish


async def _watch(tally: Tally, total: int, report: Callable[[Snapshot], None]) -> None:
    while True:
        together = Tally()
        together.kinds = {"": tally.all}
        report(Snapshot("load", together.all.finished, total, together.packed()))
        await asyncio.sleep(SNAPSHOT_SECONDS)
