"""Several servers over one bucket and one Redis: any of them is right for any session."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError, Session
from kvstore_codecs.spec import RAW
from kvstore_server.errors import Unavailable

from ..redis_server import RedisServer
from ..running import serving
from ..s3_server import S3Server
from .test_durability import SHAPE, all_equal, vectors

STALENESS_SECONDS = 0.3
pytestmark = pytest.mark.redis
Clients = tuple[AsyncKVStoreClient, AsyncKVStoreClient, AsyncKVStoreClient]


class Replicas:
    """Three servers in this loop, a client for each, and one for all."""

    def __init__(self, s3: S3Server, redis: RedisServer) -> None:
        self._endpoint, self._url, self._index = s3.endpoint, s3.bucket(), redis.url
        self._stack = AsyncExitStack()

    async def start(self, staleness_seconds: float = STALENESS_SECONDS) -> Clients:
        self.targets = targets = list[str]()
        for _ in range(3):
            server = await self._stack.enter_async_context(
                serving(
                    Path(),
                    storage={"url": self._url, "endpoint": self._endpoint},
                    index={"url": self._index, "timeout_seconds": 0.5},
                    staleness_seconds=staleness_seconds,
                )
            )
            targets.append(f"127.0.0.1:{server.port}")
        one, two, three = [await self._client(target) for target in targets]
        self.together = await self._client(targets)
        return one, two, three

    async def _client(self, target: str | list[str]) -> AsyncKVStoreClient:
        return await self._stack.enter_async_context(AsyncKVStoreClient(target))

    async def close(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def replicas(s3: S3Server, redis: RedisServer) -> AsyncGenerator[Replicas]:
    replicas = Replicas(s3, redis)
    yield replicas
    await replicas.close()


async def is_gone(session: Session) -> bool:
    try:
        await session.attend(0, torch.zeros(1, 4, 32))
    except KVStoreError as error:
        assert error.code == "ABORTED"  # noqa: PT017
        return True
    return False


def piece(both: tuple[Tensor, Tensor], start: int, end: int) -> tuple[Tensor, Tensor]:
    return both[0][:, start:end], both[1][:, start:end]


async def test_every_replica_sees_at_once_what_another_acknowledged(replicas: Replicas) -> None:
    clients = await replicas.start()
    both = vectors(60, seed=1)
    sessions = [await client.create_session("s", SHAPE, RAW) for client in clients]
    for number in range(6):
        start = 10 * number
        length = await sessions[number % 3].append(*piece(both, start, start + 10), start=start)
        assert length == start + 10
        for session in sessions:
            assert all_equal(await session.fetch(end=length), *both, length)
            await session.attend(1, torch.ones(1, 4, 32), end=length)
    assert [(await client.open_session("s")).length for client in clients] == [60] * 3
    fork = await (await clients[1].open_session("s")).fork("f", end=25)
    assert all_equal(await (await clients[2].open_session(fork.name)).fetch(), *both, 25)
    assert [info.name for info in await clients[0].list_sessions()] == ["f", "s"]


async def test_a_name_that_comes_back_is_read_at_once_and_its_past_is_gone_in_time(
    replicas: Replicas, redis: RedisServer
) -> None:
    one, two, three = await replicas.start()
    old = await one.create_session("s", SHAPE, RAW)
    await old.append(*vectors(5, seed=2))
    seen = [await client.open_session("s") for client in (two, three)]
    for session in seen:
        await session.fetch()
    redis.stop()  # nobody is told
    await one.delete_session("s")
    new = await one.create_session("s", SHAPE, RAW)
    await new.append(*vectors(7, seed=3))
    for client in (two, three):
        session = await client.open_session("s")
        assert (session.generation, session.length) == (new.generation, 7)
        assert all_equal(await session.fetch(), *vectors(7, seed=3), 7)
    await asyncio.sleep(STALENESS_SECONDS)
    assert all([await is_gone(session) for session in seen])


async def test_a_delete_is_gone_everywhere_within_the_staleness(replicas: Replicas, redis: RedisServer) -> None:
    one, two, three = await replicas.start()
    session = await one.create_session("s", SHAPE, RAW)
    await session.append(*vectors(5, seed=4))
    seen = [await client.open_session("s") for client in (two, three)]
    redis.stop()
    for each in seen:
        await each.fetch()
    await one.delete_session("s")
    await asyncio.sleep(STALENESS_SECONDS)
    assert all([await is_gone(each) for each in seen])


async def test_a_delete_is_heard_of_long_before_the_staleness(replicas: Replicas) -> None:
    one, two, three = await replicas.start(staleness_seconds=3600)
    session = await one.create_session("s", SHAPE, RAW)
    await session.append(*vectors(5, seed=5))
    seen = [await client.open_session("s") for client in (two, three)]
    await one.delete_session("s")
    give_up = time.monotonic() + 10
    while not all([await is_gone(each) for each in seen]):
        assert time.monotonic() < give_up
        await asyncio.sleep(0.05)


async def test_without_redis_all_replicas_read_and_append_and_lists_say_so(
    replicas: Replicas, redis: RedisServer
) -> None:
    clients = await replicas.start()
    both = vectors(30, seed=6)
    sessions = [await client.create_session("s", SHAPE, RAW) for client in clients]
    redis.stop()
    for number, session in enumerate(sessions):
        await session.append(*piece(both, 10 * number, 10 * number + 10), start=10 * number)
        for each in sessions:
            assert all_equal(await each.fetch(end=10 * number + 10), *both, 10 * number + 10)
    async with AsyncKVStoreClient(replicas.targets[0], retry=NO_RETRY) as client:
        with pytest.raises(KVStoreError) as refused:
            await client.list_sessions()
    assert refused.value.code == "UNAVAILABLE"


async def test_a_bucket_that_ignores_the_condition_of_a_create_is_not_served(s3: S3Server) -> None:
    url = s3.bucket()
    s3.fail("overwrite")
    try:
        with pytest.raises(Unavailable) as refused:
            async with serving(Path(), storage={"url": url, "endpoint": s3.endpoint}):
                pass
    finally:
        s3.fail("none")
    assert refused.value.reason == "STORE_UNSAFE"
