"""Servers over one Redis: listing all sessions does not grow with the servers, and goes on whichever is lost."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis

from kvstore_client import AsyncKVStoreClient
from kvstore_codecs.spec import RAW
from kvstore_server.app import Server
from kvstore_server.sessions.maintenance import SWEEPS

from ..redis_server import RedisServer
from ..running import serving
from .test_durability import SHAPE

SWEEP_SECONDS, SLOW = 0.6, 3.0
SESSIONS = 4
pytestmark = pytest.mark.redis


@pytest.fixture
async def servers(tmp_path: Path, redis: RedisServer) -> AsyncGenerator[list[Server]]:
    async with AsyncExitStack() as stack:
        index = {"url": redis.url}
        yield [
            await stack.enter_async_context(serving(tmp_path, index=index, sweep_seconds=SWEEP_SECONDS))
            for _ in range(3)
        ]


async def create(server: Server, *names: str) -> None:
    async with AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        for name in names:
            await client.create_session(name, SHAPE, RAW)


async def all_know(servers: list[Server], sessions: int, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while {each.sessions.maintenance.census.total.sessions for each in servers} != {sessions}:
        assert time.monotonic() < give_up
        await asyncio.sleep(0.02)


async def test_three_servers_list_no_more_than_one_and_each_can_be_lost(
    servers: list[Server], redis: RedisServer
) -> None:
    await create(servers[0], *(f"s{number}" for number in range(SESSIONS)))
    await all_know(servers, SESSIONS, SLOW * SWEEP_SECONDS)
    async with Redis.from_url(redis.url) as raw:
        listed = [await pages(raw)]
        await asyncio.sleep(5 * SWEEP_SECONDS)
        listed.append(await pages(raw))
    sweeps_of_one = 5 * SWEEPS / 0.5  # when it waits as short as it may
    assert 2 <= listed[1] - listed[0] <= 2 * (sweeps_of_one + 1)  # a page, and one that is empty
    for lost in (0, 1):
        await servers[lost].sessions.maintenance.close()  # it tells nobody
        await create(servers[2], f"after{lost}")
        await all_know(servers[lost + 1 :], SESSIONS + lost + 1, SLOW * SWEEP_SECONDS)


async def pages(raw: Redis) -> int:
    """Of sessions, that were listed since it began."""
    return (await raw.info("commandstats"))["cmdstat_zrangebylex"]["calls"]
