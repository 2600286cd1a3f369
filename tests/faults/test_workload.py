"""The workload that fault tests run finds what it is there to find."""

import asyncio
from pathlib import Path

import pytest

from kvstore_client import AsyncKVStoreClient, DataLoss
from kvstore_codecs.spec import RAW

from ..running import serving
from .workload import SHAPE, Lost, Worker, vectors


async def worked(folder: Path, worker: Worker) -> list[Path]:
    """The objects of what the worker wrote in a moment, oldest first."""
    async with serving(folder) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        stop = asyncio.Event()
        running = asyncio.create_task(worker.run(client, stop))
        while worker.operations < 6:
            await asyncio.sleep(0.01)
            assert not running.done()
        stop.set()
        await running
    return sorted(folder.glob("default/w-0/*/log/*"))


async def checked(folder: Path, worker: Worker) -> None:
    async with serving(folder) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        await worker.check_all(client)


async def test_an_acknowledged_append_that_is_gone_is_found(tmp_path: Path) -> None:
    worker = Worker("w", seed=1)
    objects = await worked(tmp_path, worker)
    await checked(tmp_path, worker)
    objects[-1].unlink()
    with pytest.raises(Lost):
        await checked(tmp_path, worker)


async def test_damage_is_found(tmp_path: Path) -> None:
    worker = Worker("w", seed=2)
    objects = await worked(tmp_path, worker)
    data = bytearray(objects[0].read_bytes())
    data[-1] ^= 1
    objects[0].write_bytes(data)
    with pytest.raises(DataLoss):
        await checked(tmp_path, worker)


async def test_other_bytes_than_were_sent_are_found(tmp_path: Path) -> None:
    worker = Worker("w", seed=3)
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        session = await client.create_session("w-0", SHAPE, RAW)
        k, v = vectors("w-0")
        await session.append(k[:, :1], v[:, 1:2])
        worker.acknowledged = {"w-0": 1}
        with pytest.raises(Lost):
            await worker.check_all(client)
