"""One server over a local folder, killed or stopped under load again and again: every acknowledged append is there."""

import asyncio
import random
from pathlib import Path

import pytest

from kvstore_client import AsyncKVStoreClient

from ..running import ServerProcess
from ..server_forge import Forge
from .tally import TALLY, only_in_the_whole_suite
from .workload import Worker

pytestmark = [pytest.mark.slow, only_in_the_whole_suite]
WORKERS = 8


@pytest.mark.parametrize(("signal", "cycles"), [("kill", 200), ("terminate", 100)])
async def test_what_was_acknowledged_is_there_after_every_restart(
    tmp_path: Path, forge: Forge, signal: str, cycles: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    def started(target: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(tmp_path, "--listen", target, forge=forge)

    workers = [Worker(f"w{number}", chance.randrange(2**32)) for number in range(WORKERS)]
    row = TALLY.row("kill -9 of a server, local" if signal == "kill" else "SIGTERM of a server, local")
    server, stop = await asyncio.to_thread(started), asyncio.Event()
    try:
        async with AsyncKVStoreClient(server.target) as client:
            running = asyncio.gather(*(worker.run(client, stop) for worker in workers))
            for _ in range(cycles):
                await asyncio.sleep(chance.uniform(0.1, 1.0))
                if signal == "kill":
                    await asyncio.to_thread(server.kill)
                else:
                    assert await asyncio.to_thread(server.terminate) == 0
                assert not running.done(), "a call failed"
                server = await asyncio.to_thread(started, server.target)
                row.step(cycles)
            stop.set()
            await running
            for worker in workers:
                await worker.check_all(client)
    except BaseException:
        row.losses += 1
        raise
    finally:
        row.operations += sum(worker.operations for worker in workers)
        server.kill()
