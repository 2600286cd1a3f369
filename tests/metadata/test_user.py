"""The user that the stack makes for the server in Redis may do what the index needs, and nothing else."""

import subprocess
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as Refused
from redis.exceptions import NoPermissionError

from kvstore_server.errors import Unavailable
from kvstore_server.metadata.index import Notice, ReplicaEntry
from kvstore_server.metadata.redis import RedisIndex

from ..project_rules import ROOT
from ..redis_server import running
from .conftest import SERVERS, binary
from .entries import census, entry


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    subprocess.run(["sh", ROOT / "deploy" / "make_secrets.sh", tmp_path], check=True, timeout=20)
    return tmp_path


def test_the_password_is_made_once_and_never_the_same(secrets: Path, tmp_path: Path) -> None:
    first = (secrets / "redis_password").read_text()
    subprocess.run(["sh", ROOT / "deploy" / "make_secrets.sh", secrets], check=True, timeout=20)
    assert (secrets / "redis_password").read_text() == first
    (other := tmp_path / "other").mkdir()
    subprocess.run(["sh", ROOT / "deploy" / "make_secrets.sh", other], check=True, timeout=20)
    assert (other / "redis_password").read_text() != first
    assert len(first.strip()) >= 40


@pytest.mark.parametrize("name", SERVERS)
async def test_the_index_works_as_that_user_and_no_other_key_can_be_read(secrets: Path, name: str) -> None:
    password = (secrets / "redis_password").read_text().strip()
    with running(binary(name), "--aclfile", str(secrets / "users.acl")) as server:
        url = server.url.replace("unix://", "unix://kvstore@")
        index = RedisIndex(url, password=password)
        async with index.subscribe() as notices:
            await index.put(entry("book"))
            assert [each.name for each in await index.list("default", limit=5)] == ["book"]
            await index.touch("default", "book", 2000.0)
            await index.publish(Notice(tenant="default", session="book", generation="1", length=1))
            assert (await anext(aiter(notices))).session == "book"
        await index.announce(
            ReplicaEntry(name="a:1", version="1", device="cpu", state="serving", seen_unix_seconds=1.0)
        )
        assert len(await index.replicas()) == 1
        await index.put_census(census())
        assert await index.census()
        await index.remove("default", "book", f"{1:012d}")
        await index.clear()
        await index.close()
        async with Redis.from_url(url, password=password) as redis:
            for command in (("GET", "other"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST"), ("SHUTDOWN",)):
                with pytest.raises(NoPermissionError):
                    await redis.execute_command(*command)
        async with Redis.from_url(server.url) as nobody:
            with pytest.raises(Refused):
                await nobody.get("kvstore:v1:x")
        wrong = RedisIndex(url, password="guess")
        with pytest.raises(Unavailable):
            await wrong.list("default", limit=5)
        await wrong.close()
