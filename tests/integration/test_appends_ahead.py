"""An append may come before the one it follows is durable."""

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvstore_client import AlreadyExists, AsyncKVStoreClient, InvalidArgument, OutOfRange
from kvstore_codecs.spec import RAW, ModelShape
from kvstore_server.storage.commit_log import AlreadyPresent, CommitLog, Committed
from kvstore_server.storage.local import LocalStore, StagedFile
from kvstore_server.storage.segment import Segment
from kvstore_server.storage.session_state import SessionState
from kvstore_server.storage.store import Buffer, Staged

from ..running import serving
from ..storage.inputs import next_segment

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype="float16", sm_scale=0.2)


def vectors(tokens: int) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, SHAPE.layers, tokens, SHAPE.kv_heads, SHAPE.head_dim).half()
    return k, v


@pytest.fixture
def slow_commits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Committed | AlreadyPresent]:
    """Of all servers; returns how a commit is made at once."""
    commit = CommitLog.commit

    def slowly(
        self: CommitLog, state: SessionState, segment: Segment, staged: Staged | None
    ) -> Committed | AlreadyPresent:
        time.sleep(0.2)
        return commit(self, state, segment, staged)

    monkeypatch.setattr(CommitLog, "commit", slowly)
    return commit


@pytest.mark.usefixtures("slow_commits")
async def test_an_append_waits_for_the_one_that_it_follows(tmp_path: Path) -> None:
    k, v = vectors(300)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        await client.create_session("book", SHAPE, RAW)
        handles = [await client.open_session("book") for _ in range(3)]
        sent = [
            asyncio.create_task(each.append(k[:, at : at + 100], v[:, at : at + 100], start=at))
            for each, at in zip(handles, (0, 100, 200), strict=True)
            if not await asyncio.sleep(0.05)
        ]
        assert await asyncio.gather(*sent) == [100, 200, 300]
        keys, values = await handles[0].fetch(end=300)
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@pytest.mark.usefixtures("slow_commits")
async def test_an_append_that_follows_a_refused_one_is_out_of_range(tmp_path: Path) -> None:
    k, v = vectors(200)
    k[1, 50] = torch.nan
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        await client.create_session("book", SHAPE, RAW)
        first, second = [await client.open_session("book") for _ in range(2)]
        refused = asyncio.create_task(first.append(k[:, :100], v[:, :100]))
        with pytest.raises(OutOfRange) as caught:
            await second.append(k[:, 100:], v[:, 100:], start=100)
        assert caught.value.length == 0
        with pytest.raises(InvalidArgument, match="NaN"):
            await refused


async def test_a_long_append_is_sent_in_pieces_that_overlap(tmp_path: Path) -> None:
    k, v = vectors(1000)
    limits = {"append_tokens_max": 64}
    async with serving(tmp_path, limits=limits) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("book", SHAPE, RAW)
        assert await session.append(k, v) == 1000
        keys, values = await session.fetch()
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@pytest.mark.usefixtures("slow_commits")
async def test_an_append_is_written_before_the_one_that_it_follows_is_committed_and_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, v = vectors(200)
    done = list[str]()
    link, stage = LocalStore.link, LocalStore.stage

    def noted_stage(self: LocalStore, parts: Sequence[Buffer]) -> StagedFile:
        staged = stage(self, parts)
        done.append("written")
        return staged

    def noted_link(self: LocalStore, temp: str, key: str) -> bool:
        made = link(self, temp, key)
        done.append(key.rpartition("/")[2].partition(".")[0].lstrip("0") or "0")
        return made

    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("book", SHAPE, RAW)
        behind = await client.open_session("book")
        monkeypatch.setattr(LocalStore, "stage", noted_stage)
        monkeypatch.setattr(LocalStore, "link", noted_link)
        first = asyncio.create_task(session.append(k[:, :100], v[:, :100]))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, behind.append(k[:, 100:], v[:, 100:], start=100))
    assert done == ["written", "written", "0", "100"]


async def test_what_was_written_ahead_of_an_append_that_another_writer_prevents_is_removed(
    tmp_path: Path, slow_commits: Callable[..., Committed | AlreadyPresent]
) -> None:
    k, v = vectors(200)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("book", SHAPE, RAW)
        behind = await client.open_session("book")
        first = asyncio.create_task(session.append(k[:, :100], v[:, :100]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(behind.append(k[:, 100:], v[:, 100:], start=100))
        await asyncio.sleep(0.05)
        log = CommitLog(LocalStore(tmp_path), "default")  # another server's, which is quicker
        rival = log.load("book")
        assert rival
        slow_commits(log, rival, next_segment(log, rival, 40))
        with pytest.raises(AlreadyExists):
            await first
        with pytest.raises(OutOfRange) as caught:
            await second
        assert caught.value.length == 40
    assert list((tmp_path / ".tmp").iterdir()) == []
