"""A session of very many appends becomes a few objects while it is served, and stays bit for bit what it was."""

import asyncio
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kvstore_client import AlreadyExists, AsyncKVStoreClient
from kvstore_codecs.spec import CodecSpec, Rotated
from kvstore_server.cli import app
from kvstore_server.memory.resident import ResidentSession
from kvstore_server.sessions.live import LiveSession
from kvstore_server.sessions.loading import extend_resident, read_fit
from kvstore_server.storage.commit_log import CommitLog
from kvstore_server.storage.local import LocalStore

from ..faults.tally import times
from ..running import serving
from .test_durability import SHAPE, vectors

CODEC = CodecSpec(keys=Rotated(planes=3), values=Rotated(planes=2), fit_tokens=64)
TOKENS = times(300, 2_000)
FORKED = TOKENS // 3
WAIT_SECONDS = 120.0


def objects(folder: Path) -> int:
    return sum(1 for name in ("log", "merged") for _ in folder.glob(f"default/walk/*/{name}/*.safetensors"))


def stored_bytes(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for name in ("log", "merged")
        for path in folder.glob(f"default/walk/*/{name}/*.safetensors")
    )


def opening(folder: Path) -> tuple[float, float]:
    """Seconds until the session's length is known, and until its rows are loaded."""
    log = CommitLog(LocalStore(folder), "default")
    began = time.monotonic()
    state = log.load("walk")
    assert state
    log.appends(state)
    opened = time.monotonic()
    live = LiveSession(state)
    live.fits = {entry.start: read_fit(log, state, entry) for entry in live.fit_entries}
    assert live.fits
    resident = live.resident = ResidentSession(SHAPE)
    extend_resident(log, state, live.loadable(), TOKENS)
    assert resident.length == TOKENS
    return opened - began, time.monotonic() - began


async def test_appends_of_one_token_become_few_objects_under_service(tmp_path: Path) -> None:
    k, v = vectors(TOKENS, seed=1)
    q = torch.randn(1, 4, 32)
    async with (
        serving(tmp_path, merge={"objects_min": None}) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        walk = await client.create_session("walk", SHAPE, CODEC)
        for start in range(TOKENS):
            await walk.append(k[:, start : start + 1], v[:, start : start + 1])
        before = await walk.fetch()
        attended = await walk.attend(1, q)
        early = await walk.fork("early", end=FORKED)
    report = [(objects(tmp_path), stored_bytes(tmp_path), *opening(tmp_path))]

    settings = {"staleness_seconds": 0.2, "sweep_seconds": 0.2, "gc_grace_seconds": 0.5}
    async with (
        serving(tmp_path, **settings) as server,
        AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client,
    ):
        walk = await client.open_session("walk")
        give_up = time.monotonic() + WAIT_SECONDS
        while objects(tmp_path) > 4:
            assert time.monotonic() < give_up
            for end in (1, TOKENS // 2, TOKENS):
                found = await walk.fetch(end=end)
                assert all(torch.equal(a, b[:, :end]) for a, b in zip(found, before, strict=True))
            await asyncio.sleep(0.1)
        assert await walk.append(k[:, 5:6], v[:, 5:6], start=5) == TOKENS
        with pytest.raises(AlreadyExists):
            await walk.append(k[:, 6:7], v[:, 6:7], start=5)
    report.append((objects(tmp_path), stored_bytes(tmp_path), *opening(tmp_path)))

    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        walk = await client.open_session("walk")
        assert all(torch.equal(a, b) for a, b in zip(await walk.attend(1, q), attended, strict=True))
        fork = await walk.fork("fork", end=2 * FORKED)
        await fork.append(k[:, :3], v[:, :3])
        for session, end in ((walk, TOKENS), (fork, 2 * FORKED), (await client.open_session(early.name), FORKED)):
            found = await session.fetch(end=end)
            assert all(torch.equal(a, b[:, :end]) for a, b in zip(found, before, strict=True))
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for when, (count, size, opened, loaded) in zip(("before", "after"), report, strict=True):
        print(f"{when}: {count} objects, {size:,} bytes, opened in {opened:.3f} s, loaded in {loaded:.3f} s")
    assert report[1][3] < report[0][3]
