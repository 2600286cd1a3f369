"""What was acknowledged is there: after a walk of small appends, kills, races and restarts."""

import asyncio
import random
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import AlreadyExists, AsyncKVStoreClient, KVStoreClient, KVStoreError, OutOfRange
from kvstore_codecs.spec import RAW, CodecSpec, ModelShape, Rotated

from ..running import ServerProcess, server_process, serving

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype="float16", sm_scale=0.2)
CODEC = CodecSpec(keys=Rotated(planes=3), values=Rotated(planes=2), fit_tokens=64)


def vectors(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values [layers, tokens, kv_heads, head_dim]."""
    made = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, SHAPE.layers, tokens, SHAPE.kv_heads, SHAPE.head_dim, generator=made).half()
    return k, v


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] over k, v [N, H, D], in float64."""
    group = SHAPE.query_heads // SHAPE.kv_heads
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    logits = torch.einsum("thd,nhd->thn", q.double(), keys) * SHAPE.sm_scale
    return torch.einsum("thn,nhd->thd", logits.softmax(2), values), logits.logsumexp(2)


async def test_a_walk_of_one_token_appends_reads_as_one_session(tmp_path: Path) -> None:
    k, v = vectors(2000, seed=1)
    q = torch.randn(1, 4, 32)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        walk = await client.create_session("walk", SHAPE, CODEC)
        for token in range(2000):
            assert await walk.append(k[:, token : token + 1], v[:, token : token + 1]) == token + 1
        assert (await walk.info()).exact_end == CODEC.sink_tokens + CODEC.fit_tokens - 1
        before = [await walk.attend(layer, q, end=end) for layer in range(2) for end in (1, 67, 68, 2000)]
        fork = await walk.fork("branch", end=1500)
        await fork.append(k[:, :10], v[:, :10])
        forked = await fork.attend(1, q)
        stored = await walk.fetch(dtype=torch.float32)
    out, lse = exact_attention(q, k[0, :67], v[0, :67])
    torch.testing.assert_close(before[1][0].double(), out, atol=1e-5, rtol=0)
    torch.testing.assert_close(before[1][1].double(), lse, atol=1e-5, rtol=0)

    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        walk, fork = await client.open_session("walk"), await client.open_session("branch")
        assert (walk.length, fork.length) == (2000, 1510)
        after = [await walk.attend(layer, q, end=end) for layer in range(2) for end in (1, 67, 68, 2000)]
        for (out, lse), (out_again, lse_again) in zip(before, after, strict=True):
            torch.testing.assert_close(out, out_again, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(lse, lse_again, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close((await fork.attend(1, q))[0], forked[0], atol=1e-6, rtol=1e-6)
        again = await walk.fetch(dtype=torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(stored, again, strict=True))
    assert torch.equal(stored[0][:, :67], k[:, :67].float())
    assert (stored[0][:, 67:] - k[:, 67:]).norm() < 0.25 * k[:, 67:].float().norm()


def test_every_acknowledged_append_survives_kill_9(tmp_path: Path) -> None:
    """20 kills in the middle of an append; what was acknowledged is there bit for bit, and nothing else."""
    k, v = vectors(3000, seed=2)
    chance = random.Random(20)
    acknowledged = 0
    for _ in range(20):
        with server_process(tmp_path) as server, KVStoreClient(server.target) as client:
            session = client.create_session("s", SHAPE, RAW)
            length = session.length
            assert length in (acknowledged, acknowledged + 50), (
                "an append is whole or absent, an acknowledged one there"
            )
            assert all_equal(session.fetch(), k, v, length)
            for _ in range(chance.randrange(1, 3)):
                length = session.append(k[:, length : length + 50], v[:, length : length + 50])
            acknowledged = length
            killer = asyncio.run(killed_append(server, k, v, length, chance.random() * 0.02))
            assert killer or session
    with server_process(tmp_path) as server, KVStoreClient(server.target) as client:
        session = client.open_session("s")
        assert session.length in (acknowledged, acknowledged + 50)
        assert all_equal(session.fetch(), k, v, session.length)


async def killed_append(server: ServerProcess, k: Tensor, v: Tensor, start: int, after_seconds: float) -> bool:
    """Kills the server while an append of 50 tokens is on its way; whether it was acknowledged all the same."""
    async with AsyncKVStoreClient(server.target) as client:
        session = await client.open_session("s")
        piece = k[:, start : start + 50], v[:, start : start + 50]
        task = asyncio.create_task(session.append(*piece, start=start, timeout=0.3))
        await asyncio.sleep(after_seconds)
        await asyncio.to_thread(server.kill)
        try:
            await task
        except KVStoreError:
            return False
    return True


def all_equal(found: tuple[Tensor, Tensor], k: Tensor, v: Tensor, length: int) -> bool:
    return torch.equal(found[0], k[:, :length]) and torch.equal(found[1], v[:, :length])


@pytest.mark.parametrize("equal", [True, False])
async def test_two_writers_at_one_position(tmp_path: Path, equal: bool) -> None:
    """One wins; the other hears ALREADY_EXISTS, or that the very same bytes are there."""
    first, second = vectors(8, seed=3), vectors(8, seed=3 if equal else 4)
    async with (
        serving(tmp_path) as one,
        serving(tmp_path) as two,
        AsyncKVStoreClient(f"127.0.0.1:{one.port}") as left,
        AsyncKVStoreClient(f"127.0.0.1:{two.port}") as right,
    ):
        for number in range(20):
            name = f"s{number}"
            writers = [await client.create_session(name, SHAPE, RAW) for client in (left, right)]
            results = await asyncio.gather(
                writers[0].append(*first, start=0), writers[1].append(*second, start=0), return_exceptions=True
            )
            won = [result == 8 for result in results]
            lost = [isinstance(result, AlreadyExists) for result in results]
            assert won == [True, True] if equal else sorted(won) == sorted(lost) == [False, True]
            winner = first if won[0] else second
            for client in (left, right):
                found = await (await client.open_session(name)).fetch()
                assert all_equal(found, *winner, 8)


async def test_a_start_beyond_the_length_names_the_length(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("s", SHAPE, RAW)
        await session.append(*vectors(5, seed=5))
        with pytest.raises(OutOfRange) as refused:
            await session.append(*vectors(5, seed=6), start=6)
        assert refused.value.length == 5


async def test_a_deleted_session_is_gone_and_its_name_free(tmp_path: Path) -> None:
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        old = await client.create_session("s", SHAPE, RAW)
        await old.append(*vectors(5, seed=7))
        fork = await old.fork("f", end=3)
        assert await client.delete_session("s")
        assert not await client.delete_session("s")
        new = await client.create_session("s", SHAPE, RAW)
        assert new.length == 0
        assert new.generation != old.generation
        for call in (old.attend(0, torch.zeros(1, 4, 32)), old.append(*vectors(1, seed=8))):
            with pytest.raises(KVStoreError) as refused:
                await call
            assert refused.value.code == "ABORTED"
        assert all_equal(await fork.fetch(), *vectors(5, seed=7), 3)


def test_sigterm_finishes_what_was_admitted_and_exits_0(tmp_path: Path) -> None:
    with server_process(tmp_path) as server, KVStoreClient(server.target) as client:
        session = client.create_session("s", SHAPE, RAW)
        session.append(*vectors(1000, seed=9))
        began = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - began < 20
