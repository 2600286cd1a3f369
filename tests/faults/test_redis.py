"""Whatever befalls Redis: sessions are read and appended by name, no answer is wrong, and a rebuild restores it."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from typer.testing import CliRunner

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError, TokenChain
from kvstore_codecs.spec import RAW
from kvstore_server.cli import app
from kvstore_server.metadata.keys import NAMESPACE

from ..redis_server import RedisServer
from ..redis_topologies import Sentinels
from ..running import serving
from .tally import TALLY, Row, times
from .workload import SHAPE, check, vectors

pytestmark = pytest.mark.redis
BLOCK_TOKENS = 16
NAMED = SHAPE.model_copy(update={"model_fingerprint": "llama"})
Clients = tuple[list[AsyncKVStoreClient], AsyncKVStoreClient]
Fault = Callable[[RedisServer, Redis], Awaitable[None]]


async def stop(server: RedisServer, _: Redis) -> None:
    server.stop()


async def restart(server: RedisServer, _: Redis) -> None:
    server.stop()
    server.start()


async def flush(_: RedisServer, redis: Redis) -> None:
    await redis.flushall()


async def give_wrong_types(_: RedisServer, redis: Redis) -> None:
    for name in [name async for name in redis.scan_iter(f"{NAMESPACE}*")]:
        await redis.delete(name)
        await redis.set(name, "not ours")


async def fill_memory(_: RedisServer, redis: Redis) -> None:
    await redis.config_set("maxmemory", "1")


async def make_read_only(_: RedisServer, redis: Redis) -> None:
    await redis.replicaof("127.0.0.1", "9")


async def slow_down(_: RedisServer, redis: Redis) -> None:
    await redis.client_pause(1500)


FAULTS: dict[str, Fault] = {
    "stopped": stop,
    "restarted": restart,
    "flushed": flush,
    "of wrong types": give_wrong_types,
    "out of memory": fill_memory,
    "read-only": make_read_only,
    "slow": slow_down,
}


async def heal(server: RedisServer) -> None:
    """As it was when it started, with whatever data the fault left."""
    if server.process is None:
        server.start()
    async with Redis.from_url(server.url, retry=None) as redis:
        await redis.config_set("maxmemory", "0")
        await redis.replicaof("NO", "ONE")


@asynccontextmanager
async def served(folder: Path, index_url: str) -> AsyncIterator[Clients]:
    """One for each server, and one of the second that does not ask again."""
    index = {"url": index_url, "timeout_seconds": 0.3}
    async with (
        serving(folder, index=index, staleness_seconds=0.2) as one,
        serving(folder, index=index, staleness_seconds=0.2) as two,
        AsyncKVStoreClient(f"127.0.0.1:{one.port}") as first,
        AsyncKVStoreClient(f"127.0.0.1:{two.port}") as second,
        AsyncKVStoreClient(f"127.0.0.1:{two.port}", retry=NO_RETRY) as asking,
    ):
        yield [first, second], asking


async def answered(call: Awaitable[object]) -> object:
    """What a call that needs the index answers; it may only say that the index is away."""
    try:
        return await call
    except KVStoreError as error:
        assert (error.code, error.reason) == ("UNAVAILABLE", "INDEX_UNAVAILABLE")  # noqa: PT017
        return None


async def survived(
    folder: Path, url: str, strike: Callable[[], Awaitable[None]], heal: Callable[[], Awaitable[None]], row: Row
) -> None:
    """Two servers over the index at `url`, which is struck and healed again and again."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance, total = random.Random(seed), times(1, 10)
    chain = TokenChain.of(range(512), block_tokens=BLOCK_TOKENS)
    lengths: dict[str, int] = {}
    async with served(folder, url) as (clients, asking):
        for cycle in range(total):
            name = f"s{cycle}"
            k, v = vectors(name)
            await clients[0].create_session(name, NAMED, RAW)
            await strike()
            lengths[name] = 0
            for _ in range(4):
                session = await chance.choice(clients).open_session(name)
                start, end = lengths[name], lengths[name] + chance.randint(1, 64)
                await session.append(k[:, start:end], v[:, start:end], start=start, chain=chain)
                lengths[name] = end
                for client in clients:
                    await check(await client.open_session(name), 0, end)
                    row.operations += 2
                row.operations += 1
            listed = await answered(asking.list_sessions(timeout=5))
            assert listed is None or {info.name for info in listed} <= set(lengths)  # type: ignore[attr-defined]
            match = await answered(asking.match_prefix("llama", chain, timeout=5))
            assert match is None or match.end <= lengths[match.session]  # type: ignore[attr-defined]
            await heal()
            row.step(total)
        await asyncio.sleep(1.5)  # what waited is told again, which must not matter
        arguments = ["rebuild-index", "--data", str(folder), "--index", url]
        rebuilt = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        assert (rebuilt.exit_code, rebuilt.stdout) == (0, f"{len(lengths)} sessions\n")
        longest = max(length // BLOCK_TOKENS for length in lengths.values()) * BLOCK_TOKENS
        for client in clients:
            assert {info.name: info.length for info in await client.list_sessions()} == lengths
            match = await client.match_prefix("llama", chain)
            assert (match.end if match else 0) == longest
            row.operations += 2


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_may_fail_in_any_way(tmp_path: Path, redis: RedisServer, fault: str) -> None:
    async def strike() -> None:
        async with Redis.from_url(redis.url) as raw:
            await FAULTS[fault](redis, raw)

    await survived(tmp_path, redis.url, strike, lambda: heal(redis), TALLY.row(f"Redis {fault}"))


@pytest.mark.slow
async def test_sentinels_may_choose_another_primary(tmp_path: Path, redis: RedisServer) -> None:
    with ExitStack() as stack:
        sentinels = await asyncio.to_thread(Sentinels, redis.binary, stack)

        async def strike() -> None:
            await asyncio.to_thread(sentinels.fail_over)

        async def heal() -> None:
            await asyncio.to_thread(sentinels.heal)

        await survived(tmp_path, sentinels.url, strike, heal, TALLY.row("Redis failed over"))
