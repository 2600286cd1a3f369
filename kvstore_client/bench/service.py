"""`kvstore bench service`: a server of its own on loopback, beside a plain echo of the same sizes in the same run."""

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import torch
from grpc import aio
from rich.console import Console

from kvstore_client import KVStoreClient, ModelShape, SyncSession
from kvstore_client.bench.load import Ask, rate
from kvstore_client.bench.wire import OPTIONS, AttendCall, EchoStream, echo_server, upload_seconds
from kvstore_client.demo.server import ServerProcess
from kvstore_codecs.spec import CodecSpec, Rotated
from kvstore_kernels.measurement import Measurement
from kvstore_proto.v1 import kvstore_pb2 as pb

SPEC = CodecSpec(keys=Rotated(planes=2), values=Rotated(planes=2))
MESSAGE_BYTES = 2 << 20
HOST_BYTES = 16 << 30
PINGS = 3000
REPEATS = 3
"""Of appends and fetches, whose median counts: a disk's fsync now and then takes long."""
WARM_PINGS = 200


@dataclass(frozen=True)
class Plan:
    """`layers` multiply what is appended and fetched; an Attend step reads one."""

    device: str = "auto"
    tokens: int = 131_072
    layers: int = 2
    own_tokens: int = 16_384
    """Of each session where workers have their own."""
    seconds: float = 4.0

    @property
    def shape(self) -> ModelShape:
        return ModelShape(
            layers=self.layers, kv_heads=8, query_heads=32, head_dim=128, dtype="float16", sm_scale=128**-0.5
        )


def run(plan: Plan, console: Console) -> tuple[str, list[Measurement]]:
    """The device, and the measurements in the order in which they are printed."""
    with ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-bench-"))
        target = opened.enter_context(_server(Path(folder), plan))
        client = opened.enter_context(KVStoreClient(target))
        device = client.server_info().device
        bench = ServiceBench(plan, client, target, opened.enter_context(echo_server()), console)
        bench.run()
    return device, bench.found


@contextmanager
def _server(folder: Path, plan: Plan) -> Iterator[str]:
    settings = {"KVSTORE__DEVICE__NAME": plan.device, "KVSTORE__MEMORY__HOST_BYTES_MAX": str(HOST_BYTES)}
    server = ServerProcess(folder, settings)
    server.start()
    try:
        yield server.target
    finally:
        server.stop()


class ServiceBench:
    def __init__(self, plan: Plan, client: KVStoreClient, target: str, echo: str, console: Console) -> None:
        self._plan, self._client, self._target, self._echo, self._console = plan, client, target, echo, console
        self.found: list[Measurement] = []
        self._upload = 0.0
        self._processes = max(1, min(8, (os.cpu_count() or 2) // 2))

    def run(self) -> None:
        shared = self._append()
        self._latency(shared)
        self._rates(shared)
        self._fetch(shared)

    def _add(self, name: str, shape: str, value: float, unit: str, ratio: float | None = None, peer: str = "") -> None:
        self.found.append(Measurement(name, shape, value, unit, ratio, peer))
        self._console.print(
            f"{name}, {shape}: {value:,.4g} {unit}" + ("" if ratio is None else f", {ratio:.2f} of {peer}")
        )

    def _vectors(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = self._plan.shape
        size = (2, shape.layers, tokens, shape.kv_heads, shape.head_dim)
        k, v = torch.randn(size, generator=torch.Generator().manual_seed(0)).half()
        return k, v

    def _append(self) -> SyncSession:
        plan, shape = self._plan, self._plan.shape
        k, v = self._vectors(plan.tokens)
        size = 2 * k.nbytes
        text = f"{plan.tokens:,} tokens x {plan.layers} layers, {size / 1e9:.2f} GB of fp16"
        messages = max(1, size // MESSAGE_BYTES)
        upload = messages * MESSAGE_BYTES / asyncio.run(upload_seconds(self._echo, os.urandom(MESSAGE_BYTES), messages))
        self._upload = upload
        self._add("plain upload", f"{messages} x 2 MiB", upload / 1e9, "GB/s")
        shared = self._client.create_session("shared", shape, SPEC)
        self._add("append, a server's first", text, self._timed(lambda: shared.append(k, v), size) / 1e9, "GB/s")
        later = [self._client.create_session(f"vectors-{i}", shape, SPEC) for i in range(REPEATS)]
        raw = median(self._timed(lambda each=each: each.append(k, v), size) for each in later)
        self._add("append", text, raw / 1e9, "GB/s", raw / upload, "plain upload")
        first = SPEC.fit_tokens + SPEC.sink_tokens
        encoded = [self._client.create_session(f"encoded-{i}", shape, SPEC) for i in range(REPEATS + 1)]
        for each in encoded:
            each.append(k[:, :first], v[:, :first])
        device = torch.device("cuda" if torch.cuda.is_available() and plan.device != "cpu" else "cpu")
        k, v = k[:, first:].to(device), v[:, first:].to(device)
        rates = [self._timed(lambda each=each: each.append(k, v, encode=True), 2 * k.nbytes) for each in encoded]
        rate_encoded = median(rates[1:])  # the first compiles
        where = f"encoded by the client on {device.type}, GB of fp16"
        self._add("append", where, rate_encoded / 1e9, "GB/s", rate_encoded / raw, "append")
        for each in (*later, *encoded):
            self._client.delete_session(each.name)
        return shared

    @staticmethod
    def _timed(work: Callable[[], object], size: int) -> float:
        begun = perf_counter()
        work()
        return size / (perf_counter() - begun)

    def _latency(self, shared: SyncSession) -> None:
        plan = self._plan
        shared.prefetch()
        echo50, echo99 = asyncio.run(self._echo_pings())
        ours50, ours99, kept = asyncio.run(self._attend_pings(shared.name))
        ours = f"1 x 32 queries, {plan.tokens:,} tokens"
        self._add("echo", "8 KiB, bidirectional stream, p50", echo50 * 1e6, "us")
        self._add("echo", "8 KiB, bidirectional stream, p99", echo99 * 1e6, "us")
        self._add("attend", f"{ours}, p50", ours50 * 1e6, "us", ours50 / echo50, "echo p50")
        self._add("attend", f"{ours}, p99", ours99 * 1e6, "us", ours99 / echo99, "echo p99")
        self._add("attend, standard error of a logit", "as the answer says", kept, "")

    async def _echo_pings(self) -> tuple[float, float]:
        async with aio.insecure_channel(self._echo, options=OPTIONS) as channel:
            return await _pings(EchoStream(channel, self._q()).ask)

    async def _attend_pings(self, session: str) -> tuple[float, float, float]:
        async with aio.insecure_channel(self._target, options=OPTIONS) as channel:
            q = pb.Tensor(dtype=pb.DTYPE_FLOAT16, shape=(1, 32, 128), data=self._q())
            call = AttendCall(channel, session, self._plan.tokens, q)
            await call.open()
            p50, p99 = await _pings(call.ask)
            error = (await call.ask()).items[0].fidelity.score_stderr
            await call.close()
            return p50, p99, error

    @staticmethod
    def _q() -> bytes:
        return torch.randn(1, 32, 128, generator=torch.Generator().manual_seed(1)).half().numpy().tobytes()

    def _ask(self, session: str, end: int) -> Ask:
        return Ask(session, end, (1, 32, 128), self._q())

    def _rates(self, shared: SyncSession) -> None:
        plan = self._plan
        k, v = self._vectors(plan.own_tokens)
        own = [f"own-{i}" for i in range(32)]
        for name in own:
            self._client.create_session(name, plan.shape, SPEC).append(k, v)
        cases: list[tuple[str, str, Callable[[int], Ask]]] = [
            ("echo", "", lambda _: self._ask("", 0)),
            ("attend", f"one session of {plan.tokens:,}", lambda _: self._ask(shared.name, plan.tokens)),
            ("attend", f"sessions of {plan.own_tokens:,} of their own", lambda i: self._ask(own[i], plan.own_tokens)),
        ]
        echoes = dict[int, float]()
        for name, where, ask in cases:
            for workers in (1, 8, 32):
                target = self._target if where else self._echo
                found = rate(target, [ask(i) for i in range(workers)], plan.seconds, self._processes)
                echoes.setdefault(workers, found)
                shape = f"{workers} workers" + (f", {where}" if where else ", 8 KiB")
                ratio = found / echoes[workers] if where else None
                self._add(name, shape, found, "/s", ratio, "echo of as many workers" if where else "")

    def _fetch(self, shared: SyncSession) -> None:
        size = self._plan.tokens * self._plan.shape.raw_bytes_per_token
        stored = shared.info().stored_bytes
        packed = median(self._timed(shared.fetch_sketches, size) for _ in range(REPEATS))
        share = packed * stored / size / self._upload
        self._add("fetch", "packed sketches, GB of fp16 that they stand for", packed / 1e9, "GB/s")
        self._add("fetch", "the same, GB that are stored", packed * stored / size / 1e9, "GB/s", share, "plain upload")
        shared.fetch()  # the first compiles
        decoded = median(self._timed(shared.fetch, size) for _ in range(REPEATS))
        self._add("fetch", "decoded to fp16", decoded / 1e9, "GB/s", decoded / self._upload, "plain upload")


async def _pings(ask: Callable[[], Awaitable[object]]) -> tuple[float, float]:
    """Seconds, p50 and p99."""
    for _ in range(WARM_PINGS):
        await ask()
    times = []
    for _ in range(PINGS):
        begun = perf_counter()
        await ask()
        times.append(perf_counter() - begun)
    return median(times), quantiles(times, n=100)[98]
