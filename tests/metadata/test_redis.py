"""What Redis may do to us: hold things we did not write, stop, start again empty, refuse."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncGenerator

import pytest
from redis.asyncio import Redis

from kvstore_server.errors import Unavailable
from kvstore_server.metadata import redis as redis_module
from kvstore_server.metadata.index import Notice
from kvstore_server.metadata.keys import CENSUS, NOTICES, REPLICAS, key
from kvstore_server.metadata.redis import RedisIndex

from ..redis_server import RedisServer
from .entries import census, entry

ENTRY = entry().model_dump(mode="json")
FOREIGN_VALUES = [
    "",
    "no json",
    "[]",
    "{}",
    "null",
    json.dumps(ENTRY | {"length": -1}),
    json.dumps(ENTRY | {"length": "10"}),
    json.dumps(ENTRY | {"length": 2**60}),
    json.dumps(ENTRY | {"generation": "9" * 40}),
    json.dumps(ENTRY | {"name": "b"}),
    json.dumps(ENTRY | {"tenant": "other"}),
    json.dumps(ENTRY | {"extra": 1}),
    json.dumps(ENTRY | {"last_used_unix_seconds": 1e300}),
    '{"length": NaN}',
    b"\xff\xfe",
    "x" * 100_000,
]


CENSUS_TEXT = census().model_dump_json()
NOTICE = '{"tenant":"default","session":"a","generation":"1","length":1}'


@pytest.fixture
async def raw(own_server: RedisServer) -> AsyncGenerator[Redis]:
    async with Redis.from_url(own_server.url) as client:
        yield client


@pytest.mark.parametrize("value", FOREIGN_VALUES, ids=range(len(FOREIGN_VALUES)))
async def test_a_malformed_entry_is_absent_and_gives_way(redis_index: RedisIndex, raw: Redis, value: str) -> None:
    await redis_index.put(entry("a"))
    await redis_index.put(entry("b"))
    await raw.hset(key("default", "sessions"), "a", value)
    assert await redis_index.get("default", "a") is None
    assert await redis_index.list("default", limit=1) == [entry("b")]
    assert await redis_index.put(entry("a", length=5))
    assert await redis_index.list("default", limit=9) == [entry("a", length=5), entry("b")]


async def test_what_is_malformed_is_counted(redis_index: RedisIndex, raw: Redis) -> None:
    await redis_index.put(entry())
    await raw.hset(key("default", "sessions"), "a", "{}")
    await redis_index.get("default", "a")
    assert redis_index.malformed == 1


@pytest.mark.parametrize("part", ["sessions", "names", "used"])
async def test_a_key_of_another_type_is_absent_and_gives_way(redis_index: RedisIndex, raw: Redis, part: str) -> None:
    await redis_index.put(entry("a"))
    await raw.delete(key("default", part))
    await raw.rpush(key("default", part), "a list")
    await redis_index.touch("default", "a", 2000.0)
    await redis_index.list("default", limit=9)
    await redis_index.remove("default", "z", "1")
    assert await redis_index.put(entry("a", length=20))
    assert [(e.name, e.length) for e in await redis_index.list("default", limit=9)] == [("a", 20)]


@pytest.mark.parametrize("score", [float("inf"), -1.0, 1e300])
async def test_a_senseless_last_use_is_ignored(redis_index: RedisIndex, raw: Redis, score: float) -> None:
    await redis_index.put(entry())
    await raw.zadd(key("default", "used"), {"a": score})
    assert await redis_index.get("default", "a") == entry()


@pytest.mark.parametrize("value", ["", "-1", "soon", "9" * 40, "1" * 10_000])
async def test_a_malformed_removal_is_absent(redis_index: RedisIndex, raw: Redis, value: str) -> None:
    await raw.set(key("default", "removed", "a"), value)
    assert await redis_index.put(entry())
    await redis_index.remove("default", "a", "1")
    assert not await redis_index.put(entry())


async def test_a_removal_is_forgotten_after_a_while(redis_index: RedisIndex, raw: Redis) -> None:
    await redis_index.remove("default", "a", "1")
    assert 0 < await raw.ttl(key("default", "removed", "a")) <= 3600


@pytest.mark.parametrize(
    "value", ["", "{}", "no json", b"\xff", '{"tenant":"../x","session":"a","generation":"1","length":1}']
)
async def test_a_malformed_notice_is_skipped(redis_index: RedisIndex, raw: Redis, value: str) -> None:
    notice = Notice.model_validate_json(NOTICE)
    async with redis_index.subscribe() as notices:
        await raw.publish(NOTICES, value)
        await redis_index.publish(notice)
        async with asyncio.timeout(5):
            assert await anext(notices) == notice
    assert redis_index.malformed == 1


async def calls(index: RedisIndex) -> list[str]:
    notice = Notice.model_validate_json(NOTICE)
    outcomes: list[str] = []
    for call in (
        index.put(entry()),
        index.remove("default", "a", "1"),
        index.get("default", "a"),
        index.list("default", limit=1),
        index.touch("default", "a", 1.0),
        index.publish(notice),
        index.put_census(census()),
        index.census(),
        index.ping(),
        index.clear(),
        index.subscribe().__aenter__(),
    ):
        try:
            await call
            outcomes.append("ok")
        except Unavailable as error:
            outcomes.append(error.reason)
    return outcomes


async def test_a_lost_server_is_unavailable_at_once_and_found_again(
    redis_index: RedisIndex, own_server: RedisServer
) -> None:
    await redis_index.put(entry())
    own_server.stop()
    began = time.monotonic()
    assert await calls(redis_index) == ["INDEX_UNAVAILABLE"] * 11
    assert time.monotonic() - began < 11 * 0.5 + 1
    own_server.start()
    assert await redis_index.get("default", "a") is None
    assert await redis_index.put(entry())


async def test_a_server_that_hangs_is_unavailable_within_the_timeout(
    redis_index: RedisIndex, own_server: RedisServer
) -> None:
    await redis_index.ping()
    assert own_server.process
    own_server.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unavailable):
        await redis_index.put(entry())
    assert time.monotonic() - began < 1.5
    own_server.process.send_signal(signal.SIGCONT)
    assert await redis_index.put(entry())
    assert await redis_index.get("default", "a") == entry()


async def test_a_subscriber_learns_that_the_server_was_lost(redis_index: RedisIndex, own_server: RedisServer) -> None:
    async with redis_index.subscribe() as notices:
        own_server.stop()
        own_server.start()
        with pytest.raises(Unavailable):
            await asyncio.wait_for(anext(notices), 5)


async def test_a_server_that_takes_no_writes_still_answers_reads(redis_index: RedisIndex, raw: Redis) -> None:
    await redis_index.put(entry())
    await raw.config_set("maxmemory", "1")
    with pytest.raises(Unavailable):
        await redis_index.put(entry(length=20))
    assert await redis_index.get("default", "a") == entry()


async def test_a_wrong_password_is_unavailable(own_server: RedisServer, raw: Redis) -> None:
    await raw.config_set("requirepass", "right")
    wrong, right = (RedisIndex(own_server.url, password=p) for p in ("wrong", "right"))
    with pytest.raises(Unavailable) as raised:
        await wrong.ping()
    assert "wrong" not in str(raised.value)
    await right.ping()
    await wrong.close()
    await right.close()


async def test_two_servers_that_share_it_agree(redis_index: RedisIndex, own_server: RedisServer) -> None:
    other = RedisIndex(own_server.url, timeout_seconds=5.0)
    puts = [index.put(entry(length=n)) for n in range(10) for index in (redis_index, other)]
    await asyncio.gather(*puts)
    assert await other.get("default", "a") == entry(length=9) == await redis_index.get("default", "a")
    await other.close()


async def test_a_quiet_subscription_lasts_and_a_dead_one_is_noticed(
    redis_index: RedisIndex, own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "IDLE_SECONDS", 0.1)
    notice = Notice.model_validate_json(NOTICE)
    async with redis_index.subscribe() as notices:
        waiting = asyncio.ensure_future(anext(notices))
        await asyncio.sleep(0.5)
        await redis_index.publish(notice)
        assert await asyncio.wait_for(waiting, 5) == notice
        assert own_server.process
        own_server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(anext(notices), 5)


@pytest.mark.parametrize("value", FOREIGN_VALUES, ids=range(len(FOREIGN_VALUES)))
async def test_a_malformed_server_is_absent_and_forgotten(redis_index: RedisIndex, raw: Redis, value: str) -> None:
    await raw.hset(REPLICAS, "a", value)
    assert await redis_index.replicas() == []
    assert redis_index.malformed == 1
    assert await raw.hgetall(REPLICAS) == {}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("{}", 10),
        (CENSUS_TEXT.replace('"sessions":2', '"sessions":-2'), 10),
        (CENSUS_TEXT, None),  # for ever
        (CENSUS_TEXT, 3600),  # longer than it says: the clock went back
    ],
)
async def test_a_malformed_census_is_absent_and_gives_way(
    redis_index: RedisIndex, raw: Redis, value: str, seconds: int | None
) -> None:
    await raw.set(CENSUS, value, ex=seconds)
    assert await redis_index.census() is None
    assert redis_index.malformed == 1
    await redis_index.put_census(census())
    assert await redis_index.census()


async def test_a_census_of_another_type_or_length_is_absent_and_gives_way(
    redis_index: RedisIndex, raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await raw.hset(CENSUS, "a", "b")
    assert await redis_index.census() is None
    await redis_index.put_census(census())
    assert await redis_index.census()
    monkeypatch.setattr(redis_module, "CENSUS_BYTES_MAX", len(CENSUS_TEXT) - 1)
    assert await redis_index.census() is None
