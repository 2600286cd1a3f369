"""The longest stored prefix of a chain of token hashes, whoever stored it; never one that the store does not hold."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic, time

import pytest
import torch
from torch import Tensor

from kvstore_client import NO_RETRY, AsyncKVStoreClient, KVStoreError, PrefixMatch, Retry, TokenChain
from kvstore_codecs.spec import RAW
from kvstore_server.metadata.index import PrefixEntry
from kvstore_server.metadata.redis import RedisIndex
from kvstore_server.sessions.prefixes import label_of

from ..redis_server import RedisServer
from ..running import serving
from .test_durability import SHAPE

MODEL = "llama"
NAMED = SHAPE.model_copy(update={"model_fingerprint": MODEL})
BLOCK = 16
pytestmark = pytest.mark.redis


def vectors(tokens: int) -> tuple[Tensor, Tensor]:
    k, v = torch.ones(2, SHAPE.layers, tokens, SHAPE.kv_heads, SHAPE.head_dim).half()
    return k, v


def chain(*token_ids: range) -> TokenChain:
    return TokenChain.of([each for ids in token_ids for each in ids], block_tokens=BLOCK)


class Two:
    """Two servers over one folder and one Redis."""

    def __init__(self, folder: Path, redis: RedisServer) -> None:
        self._folder, self._redis = folder, redis
        self._stack = AsyncExitStack()

    async def client(self, retry: Retry | None = None) -> AsyncKVStoreClient:
        index = {"url": self._redis.url, "timeout_seconds": 0.5}
        server = await self._stack.enter_async_context(serving(self._folder, index=index, staleness_seconds=0.2))
        return await self._stack.enter_async_context(
            AsyncKVStoreClient(f"127.0.0.1:{server.port}", retry=retry or Retry())
        )

    async def close(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def two(tmp_path: Path, redis: RedisServer) -> AsyncGenerator[Two]:
    two = Two(tmp_path, redis)
    yield two
    await two.close()


async def match(client: AsyncKVStoreClient, wanted: TokenChain) -> tuple[str, int] | None:
    """After what the server has to tell the index was told."""
    await client.list_sessions()
    found = await client.match_prefix(MODEL, wanted)
    return None if found is None else (found.session, found.end)


async def test_the_longest_prefix_is_found_at_any_replica_and_can_be_read(two: Two) -> None:
    one, other = await two.client(), await two.client()
    book = await one.create_session("book", NAMED, RAW)
    whole = chain(range(100))
    for start, end in ((0, 7), (7, 40), (40, 100)):
        k, v = vectors(end - start)
        await book.append(k, v, chain=whole)
    assert await match(one, whole) == ("book", 96)
    assert await match(other, whole) == ("book", 96)
    assert await match(other, chain(range(200))) == ("book", 96)
    assert await match(other, chain(range(50), range(7))) == ("book", 48)
    assert await match(other, chain(range(1, 100))) is None
    assert await match(other, TokenChain.of(range(100), block_tokens=10)) is None
    assert await other.match_prefix("mistral", whole) is None
    found = await other.match_prefix(MODEL, whole)
    assert isinstance(found, PrefixMatch)
    assert found.valid_until_unix_seconds > time() + 3000
    fork = await (await other.open_session(found.session)).fork("copy", end=found.end)
    assert fork.length == 96


async def test_a_fork_is_found_when_its_parent_is_gone_and_a_deleted_session_never(two: Two) -> None:
    one, other = await two.client(), await two.client()
    book = await one.create_session("book", NAMED, RAW)
    await book.append(*vectors(64), chain=chain(range(64)))
    fork = await book.fork("fork", end=40)
    await fork.append(*vectors(40), chain=chain(range(40), range(500, 540)))
    await one.list_sessions()
    await book.delete()
    assert await match(one, chain(range(64))) == ("fork", 32)
    assert await match(one, chain(range(40), range(500, 540))) == ("fork", 80)
    await fork.delete()
    assert await match(one, chain(range(64))) is None
    again = await one.create_session("book", NAMED, RAW)
    await again.append(*vectors(16), chain=chain(range(16)))
    assert await match(one, chain(range(64))) == ("book", 16)
    assert await match(other, chain(range(64))) == ("book", 16)


async def test_what_the_index_says_is_believed_only_if_the_store_says_so_too(two: Two, redis: RedisServer) -> None:
    client = await two.client()
    book = await client.create_session("book", NAMED, RAW)
    await book.append(*vectors(32), chain=chain(range(32)))
    await client.list_sessions()
    index = RedisIndex(redis.url)
    wanted = chain(range(64))
    lies = [PrefixEntry(session=name, generation=book.generation, end=48) for name in ("book", "nobody")]
    await index.put_prefixes("default", [(label_of(MODEL, wanted.hashes[2]), lie) for lie in lies])
    await index.close()
    assert await match(client, wanted) == ("book", 32)


async def test_without_an_index_matching_says_so(two: Two, redis: RedisServer) -> None:
    client = await two.client(NO_RETRY)
    redis.stop()
    with pytest.raises(KVStoreError) as refused:
        await client.match_prefix(MODEL, chain(range(64)), timeout=10)
    assert refused.value.code == "UNAVAILABLE"


async def test_a_flushed_index_finds_prefixes_again_after_a_restart(two: Two, redis: RedisServer) -> None:
    client = await two.client()
    book = await client.create_session("book", NAMED, RAW)
    await book.append(*vectors(32), chain=chain(range(32)))
    assert await match(client, chain(range(32))) == ("book", 32)
    redis.stop()
    redis.start()
    assert await match(client, chain(range(32))) is None
    restarted, give_up = await two.client(), monotonic() + 20
    while await match(restarted, chain(range(32))) != ("book", 32):  # it serves meanwhile
        assert monotonic() < give_up
        await asyncio.sleep(0.05)
