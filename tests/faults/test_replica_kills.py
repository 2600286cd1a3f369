"""Replicas over one bucket and one Redis are killed one after another under load: nobody who calls hears of it."""

import asyncio
import random

import pytest

from kvstore_client import AsyncKVStoreClient

from ..redis_server import RedisServer
from ..running import ServerProcess
from ..s3_server import S3Server
from .tally import TALLY, only_in_the_whole_suite
from .workload import Worker

pytestmark = [pytest.mark.redis, pytest.mark.slow, only_in_the_whole_suite]
REPLICAS, WORKERS, KILLS = 3, 4, 12


async def test_a_killed_replica_costs_its_clients_a_retry_and_nothing_else(s3: S3Server, redis: RedisServer) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    url, environment = s3.bucket(), {"KVSTORE__STORAGE__ENDPOINT": s3.endpoint, "NUMBA_NUM_THREADS": "1"}

    def started(target: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(url, "--listen", target, "--index", redis.url, env=environment)

    replicas = list(await asyncio.gather(*(asyncio.to_thread(started) for _ in range(REPLICAS))))
    workers = [Worker(f"w{number}", chance.randrange(2**32)) for number in range(WORKERS)]
    row = TALLY.row("kill -9 of a replica, bucket")
    stop = asyncio.Event()
    try:
        async with AsyncKVStoreClient([replica.target for replica in replicas]) as client:
            running = asyncio.gather(*(worker.run(client, stop) for worker in workers))
            for cycle in range(KILLS):
                await asyncio.sleep(chance.uniform(0.2, 1.0))
                victim = cycle % REPLICAS
                await asyncio.to_thread(replicas[victim].kill)
                assert not running.done(), "a call failed"
                replicas[victim] = await asyncio.to_thread(started, replicas[victim].target)
                row.cycles += 1
            stop.set()
            await running
        for replica in replicas:
            async with AsyncKVStoreClient(replica.target) as client:
                for worker in workers:
                    await worker.check_all(client)
    except BaseException:
        row.losses += 1
        raise
    finally:
        row.operations += sum(worker.operations for worker in workers)
        for replica in replicas:
            replica.kill()
    assert all(worker.acknowledged for worker in workers)
