"""A session with bases of its own, whose server is killed while it is fitted: each fit is there once, or not yet."""

import asyncio
import random
from itertools import pairwise
from pathlib import Path

import pytest

from kvstore_client import AsyncKVStoreClient

from ..integration.test_epochs import CUTS, SHAPE, SPEC, answers, assert_same, filled, vectors
from ..running import ServerProcess, serving
from ..server_forge import Forge
from .tally import TALLY, times
from .workload import TIMEOUT_SECONDS

SECONDS = 1.5
"""That an append takes on a server that has just started."""
SESSIONS = times(1, 20)
pytestmark = pytest.mark.slow


async def test_a_server_that_is_killed_while_epochs_begin_loses_none(tmp_path: Path, forge: Forge) -> None:
    """Killed once while each append is under way; what is acknowledged then is the session of one that never was."""
    async with serving(tmp_path / "calm") as calm, AsyncKVStoreClient(f"127.0.0.1:{calm.port}") as client:
        expected = await answers(await filled(client, "calm"))
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, row = random.Random(seed), TALLY.row("kill -9 of a server while it fits and encodes")
    server = await asyncio.to_thread(ServerProcess, tmp_path / "killed", forge=forge)
    k, v = vectors()
    try:
        async with AsyncKVStoreClient(server.target) as client:
            for number in range(SESSIONS):
                session = await client.create_session(f"s{number}", SHAPE, SPEC, timeout=TIMEOUT_SECONDS)
                for start, end in pairwise(CUTS):
                    append = session.append(k[:, start:end], v[:, start:end], start=start, timeout=TIMEOUT_SECONDS)
                    under_way = asyncio.ensure_future(append)
                    await asyncio.sleep(chance.uniform(0, SECONDS))
                    await asyncio.to_thread(server.kill)
                    args = "--listen", server.target
                    server = await asyncio.to_thread(ServerProcess, tmp_path / "killed", *args, forge=forge)
                    await under_way
                    row.operations += 1
                    row.step(SESSIONS * (len(CUTS) - 1))
            for number in range(SESSIONS):
                assert_same(await answers(await client.open_session(f"s{number}")), expected)
    except BaseException:
        row.losses += 1
        raise
    finally:
        server.kill()
