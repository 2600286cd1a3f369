"""Calls that are sent when they are due, whatever became of those before, to a server of known capacity."""

import asyncio
import os
import random
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from kvstore_client import AsyncKVStoreClient
from kvstore_client.rpcs import TOP_K
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.identity.key_store import KeyStore
from kvstore_server.storage.local import LocalStore

from ..program import free_port
from ..running import ServerProcess

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=2, head_dim=32, dtype="float32", sm_scale=0.2)
TOKENS = 8
WORK_SECONDS = 0.04
CAPACITY = 1 / WORK_SECONDS
"""Calls a second."""
DEADLINE_SECONDS = 2.0
WHOLE_SUITE = os.environ.get("KVSTORE_TIER") == "F"
REFUSAL_SECONDS_MAX = 0.01 if WHOLE_SUITE else 0.05
"""A bound of a bucket of kvstore_refused_seconds; a plain run shares its cores with other tests."""
SLOW_DEVICE = str(Path(__file__).parent.parent / "slow_device.py")


@dataclass
class Outcomes:
    """Of the calls of one tenant in one phase."""

    seconds: float = 0.0
    """How long calls were sent."""
    codes: Counter[str] = field(default_factory=Counter[str])
    hinted: int = 0
    """Refusals that said when to come again."""
    latencies: list[float] = field(default_factory=list[float])
    """Seconds, of what was answered."""

    @property
    def offered(self) -> int:
        return self.codes.total()

    @property
    def goodput(self) -> float:
        """Answers within their deadline, a second."""
        return self.codes["OK"] / self.seconds


@dataclass(frozen=True)
class Loaded:
    """A server with a session of each tenant."""

    server: ServerProcess
    metrics_url: str
    keys: Mapping[str, str]

    @property
    def resident_bytes(self) -> int:
        return int(Path(f"/proc/{self.server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def refusals_within(self, seconds: float) -> tuple[int, int]:
        """How many refusals took the server at most so long, a bucket's bound, and how many there were."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            text = answer.read().decode()
        found = {"within": 0.0, "all": 0.0}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "kvstore_refused_seconds_bucket" and sample.labels["reason"] == "BUSY":
                    found["within"] += sample.value if float(sample.labels["le"]) == seconds else 0
                    found["all"] += sample.value if sample.labels["le"] == "+Inf" else 0
        return int(found["within"]), int(found["all"])

    async def drive(self, rates: Mapping[str, float], seconds: float) -> dict[str, Outcomes]:
        """Each tenant's calls at its rate, Poisson, for so long; returns when all are answered."""
        outcomes = {tenant: Outcomes(seconds) for tenant in rates}
        async with grpc.aio.insecure_channel(self.server.target) as channel:
            await asyncio.gather(
                *(self._send(channel, tenant, rate, outcomes[tenant]) for tenant, rate in rates.items())
            )
        return outcomes

    async def _send(self, channel: grpc.aio.Channel, tenant: str, rate: float, outcome: Outcomes) -> None:
        chance, call = random.Random(tenant), channel.unary_unary(TOP_K.path)
        metadata = (("authorization", f"Bearer {self.keys[tenant]}"),)
        q = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, 2, 32], data=bytes(256))
        request = pb.TopKRequest(session="s", end=TOKENS, q=q, k=1).SerializeToString()

        async def one() -> None:
            began = time.monotonic()
            try:
                await call(request, timeout=DEADLINE_SECONDS, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                outcome.codes[error.code().name] += 1
                outcome.hinted += any(key == "grpc-retry-pushback-ms" for key, _ in error.trailing_metadata() or ())
            else:
                outcome.codes["OK"] += 1
                outcome.latencies.append(time.monotonic() - began)

        due, end, sent = time.monotonic(), time.monotonic() + outcome.seconds, set[asyncio.Task[None]]()
        while (due := due + chance.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent.add(asyncio.create_task(one()))
        await asyncio.gather(*sent)

    async def health_seconds(self) -> float:
        """How long a health check takes now."""
        began = time.monotonic()
        async with grpc.aio.insecure_channel(self.server.target) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)  # type: ignore[attr-defined]
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        return time.monotonic() - began


@asynccontextmanager
async def loaded(folder: Path, tenants: list[str], settings: str = "", **env: str) -> AsyncIterator[Loaded]:
    """A server with `settings` (YAML) whose device takes WORK_SECONDS for each TopK."""
    data, config = folder / "data", folder / "settings.yaml"
    store = KeyStore(LocalStore(data))
    keys = {tenant: store.create(tenant, "writer") for tenant in tenants}
    config.write_text(f"identity: {{api_keys: true}}\n{settings}")
    metrics = f"127.0.0.1:{free_port()}"
    arguments = ["--metrics", metrics, "--config", str(config)]
    env = {"SLOW_DEVICE_SECONDS": str(WORK_SECONDS), **env}
    server = await asyncio.to_thread(ServerProcess, data, *arguments, env=env, cli=[SLOW_DEVICE])
    try:
        for tenant in tenants:
            async with AsyncKVStoreClient(server.target, api_key=keys[tenant]) as client:
                session = await client.create_session("s", SHAPE, RAW)
                await session.append(torch.randn(1, TOKENS, 1, 32), torch.randn(1, TOKENS, 1, 32))
        yield Loaded(server, f"http://{metrics}/metrics", keys)
    finally:
        server.kill()
