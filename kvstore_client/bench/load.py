"""Closed-loop workers in processes of their own: how many questions a second a server answers."""

import asyncio
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

from grpc import aio

from kvstore_client.bench.wire import OPTIONS, AttendCall, EchoStream
from kvstore_client.demo.processes import WorkerProcess, await_go, results
from kvstore_proto.v1 import kvstore_pb2 as pb

START_SECONDS = 120.0


@dataclass(frozen=True)
class Ready:
    pass


@dataclass(frozen=True)
class Served:
    answers: int
    seconds: float


@dataclass(frozen=True)
class Ask:
    """What one stream asks again and again; no session: an echo of `data`."""

    session: str
    end: int
    q_shape: tuple[int, int, int]
    data: bytes

    def stream(self, channel: aio.Channel) -> EchoStream | AttendCall:
        if not self.session:
            return EchoStream(channel, self.data)
        q = pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=self.q_shape, data=self.data)
        return AttendCall(channel, self.session, self.end, q)


def rate(target: str, asks: list[Ask], seconds: float, processes: int) -> float:
    """Answers a second of one stream for each of `asks`, dealt to so many processes."""
    shares = [share for share in (asks[i::processes] for i in range(processes)) if share]
    workers = [WorkerProcess(f"load {i}", _work, target, share, seconds) for i, share in enumerate(shares)]
    try:
        results(workers, Ready, START_SECONDS, lambda *_: None)
        for worker in workers:
            worker.pipe.send(None)
        served = results(workers, Served, START_SECONDS + 2 * seconds, lambda *_: None)
    finally:
        for worker in workers:
            worker.end()
    return sum(each.answers / each.seconds for each in served)


def _work(pipe: "Connection[Any, Any]", target: str, asks: list[Ask], seconds: float) -> None:
    asyncio.run(_run(pipe, target, asks, seconds))


async def _run(pipe: "Connection[Any, Any]", target: str, asks: list[Ask], seconds: float) -> None:
    async with aio.insecure_channel(target, options=OPTIONS) as channel:
        streams = [ask.stream(channel) for ask in asks]
        for stream in streams:
            await (stream.open() if isinstance(stream, AttendCall) else stream.ask())
        pipe.send(Ready())
        await asyncio.to_thread(await_go, pipe, START_SECONDS)
        begun = perf_counter()
        counts = await asyncio.gather(*(_ask_until(stream, begun + seconds) for stream in streams))
        pipe.send(Served(sum(counts), perf_counter() - begun))
        for stream in streams:
            await stream.close()


async def _ask_until(stream: EchoStream | AttendCall, end: float) -> int:
    count = 0
    while perf_counter() < end:
        await stream.ask()
        count += 1
    return count
