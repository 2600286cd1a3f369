"""SIGTERM under load: what was admitted is answered, and the server ends in time."""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kvstore_client import NO_RETRY, AsyncKVStoreClient, Cancelled, KVStoreError, Unavailable
from kvstore_codecs.spec import RAW, ModelShape

from ..running import ServerProcess
from ..server_forge import Forge
from .tally import TALLY, times

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=2, head_dim=32, dtype="float32", sm_scale=0.2)
TOKENS = 8
WORK_SECONDS = 0.02
WORKERS = 8
"""Of each kind of work: calls and steps wait for the device for about WORKERS x WORK_SECONDS and more."""
ARRIVED_SECONDS = 0.1
"""What was sent so long before the signal had reached the server by then."""
DRAIN_SECONDS = 20
PARTS = 4
"""Of the whole suite's 100 cycles, so that each can be run alone."""

pytestmark = pytest.mark.slow


@dataclass
class Work:
    """What clients that repeat nothing saw."""

    answered: int = 0
    failed: list[tuple[float, KVStoreError]] = field(default_factory=list[tuple[float, KVStoreError]])
    """When the call was sent, and how it ended."""

    async def query(self, client: AsyncKVStoreClient, number: int) -> None:
        """Top-k calls or Attend steps, one after the other, until one fails."""
        session, q = await client.open_session("s"), torch.ones(1, 2, 32)
        while True:
            sent = time.monotonic()
            try:
                await (session.attend(0, q, end=TOKENS) if number % 2 else session.topk(0, q, k=1, end=TOKENS))
            except KVStoreError as error:
                self.failed.append((sent, error))
                return
            self.answered += 1

    async def append(self, client: AsyncKVStoreClient, number: int, acknowledged: dict[str, int]) -> None:
        """One token after the other, until one fails."""
        name = f"own-{number}"
        session = await client.create_session(name, SHAPE, RAW)
        while True:
            sent = time.monotonic()
            try:
                acknowledged[name] = await session.append(torch.ones(1, 1, 1, 32), torch.ones(1, 1, 1, 32))
            except KVStoreError as error:
                self.failed.append((sent, error))
                return
            self.answered += 1

    def lost(self, signalled: float) -> list[KVStoreError]:
        """Failures of what had arrived, and those of other calls that do not say that they may be made again."""
        return [
            error
            for sent, error in self.failed
            if not isinstance(error, Unavailable | Cancelled)
            or (sent < signalled - ARRIVED_SECONDS and error.reason != "DRAINING")
        ]


async def one_cycle(folder: Path, forge: Forge, seconds: float, drain_seconds: float) -> tuple[Work, float, int]:
    """The work, when the signal came, and the exit code; acknowledged appends are checked."""
    env = {"SLOW_DEVICE_SECONDS": str(WORK_SECONDS), "KVSTORE__DRAIN_SECONDS": str(drain_seconds)}
    server = await asyncio.to_thread(ServerProcess, folder, env=env, forge=forge)
    work, acknowledged = Work(), dict[str, int]()
    try:
        async with AsyncKVStoreClient(server.target, retry=NO_RETRY) as client:
            session = await client.create_session("s", SHAPE, RAW)
            await session.append(torch.randn(1, TOKENS, 1, 32), torch.randn(1, TOKENS, 1, 32), start=session.length)
            working = asyncio.gather(
                *(work.query(client, number) for number in range(WORKERS)),
                *(work.append(client, number, acknowledged) for number in range(2)),
            )
            await asyncio.sleep(seconds)
            signalled = time.monotonic()
            code = await asyncio.to_thread(server.terminate)
            await working
    finally:
        server.kill()
    for name, length in acknowledged.items():
        await check(folder, name, length)
    return work, signalled, code


async def check(folder: Path, name: str, length: int) -> None:
    log = sorted((folder / "default" / name).glob("*/log/*.safetensors"))
    assert len(log) >= length, f"{name}: {length} appends were acknowledged, {len(log)} are there"


@pytest.mark.parametrize("part", range(PARTS if times(0, 1) else 1))
async def test_what_was_admitted_is_answered_and_the_server_exits_0_in_time(
    tmp_path: Path, forge: Forge, part: int
) -> None:
    row = TALLY.row("SIGTERM of a loaded server, nothing repeated")
    chance = random.Random(part)
    total = times(2, 100 // PARTS)
    slowest = 0.0
    for cycle in range(total):
        work, signalled, code = await one_cycle(tmp_path / str(cycle), forge, chance.uniform(0.3, 0.8), DRAIN_SECONDS)
        lost = work.lost(signalled)
        row.operations += work.answered
        row.losses += len(lost)
        row.step(total * PARTS)
        assert (code, lost) == (0, [])
        assert work.answered >= WORKERS
        slowest = max(slowest, time.monotonic() - signalled)
    print(f"slowest end after a signal: {slowest:.1f} s, allowed {DRAIN_SECONDS} s")
    assert slowest < DRAIN_SECONDS


async def test_a_server_that_does_not_wait_for_what_it_admitted_is_found(tmp_path: Path, forge: Forge) -> None:
    lost = 0
    for cycle in range(3):
        work, signalled, code = await one_cycle(tmp_path / str(cycle), forge, 0.5, drain_seconds=0.001)
        lost += len(work.lost(signalled)) + (code != 0)
    assert lost


async def test_a_second_signal_ends_the_server_at_once(tmp_path: Path, forge: Forge) -> None:
    env = {"SLOW_DEVICE_SECONDS": "5"}
    server = await asyncio.to_thread(ServerProcess, tmp_path, env=env, forge=forge)
    try:
        async with AsyncKVStoreClient(server.target, retry=NO_RETRY) as client:
            session = await client.create_session("s", SHAPE, RAW)
            await session.append(torch.randn(1, TOKENS, 1, 32), torch.randn(1, TOKENS, 1, 32))
            asked = asyncio.create_task(session.topk(0, torch.ones(1, 2, 32), k=1))
            await asyncio.sleep(0.5)
            server.signal(signal.SIGTERM)
            await asyncio.sleep(0.5)
            assert server.running
            began = time.monotonic()
            server.signal(signal.SIGTERM)
            assert await asyncio.to_thread(server.ended, 10) == 128 + signal.SIGTERM
            assert time.monotonic() - began < 2
            with pytest.raises(Unavailable):
                await asked
        await check(tmp_path, "s", 1)
    finally:
        server.kill()


def handles_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.4, 0.8])
async def test_a_server_that_is_stopped_while_it_starts_ends_cleanly(
    tmp_path: Path, forge: Forge, delay: float
) -> None:
    readable, writable = os.pipe()
    arguments = ["serve", "--data", str(tmp_path), "--listen", "127.0.0.1:0", "--metrics", "off", "--device", "cpu"]
    process = forge.start(arguments, {"OMP_NUM_THREADS": "1"}, writable)
    os.close(writable)
    async with asyncio.timeout(30):
        while not handles_sigterm(process.pid):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await asyncio.sleep(delay)
    process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.wait, 10)
    os.close(readable)
    assert code == 0
