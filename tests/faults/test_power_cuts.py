"""A real server on a file system that loses what was not synced: a power cut takes nothing that was acknowledged."""

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore_client import KVStoreError

from ..project_rules import ROOT
from ..running import ServerProcess
from ..server_forge import Forge
from .tally import TALLY, Row, only_in_the_whole_suite
from .workload import Lost, work_through

CUTS, CUTS_OF_A_CANARY = 100, 10
LEFT = [(data, names) for data in ("dropped", "torn", "zeros", "garbage") for names in ("none", "some", "all")]
"""What of the unsynced bytes and names is left."""
MOUNT_SECONDS_MAX = 60


def what_is_missing() -> str:
    """Why no file system can be mounted here; empty if one can."""
    if os.geteuid() != 0:
        return "only the superuser may mount"
    if not os.path.exists("/dev/fuse"):
        return "no /dev/fuse"
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"no libfuse ({error}): Debian has it as libfuse3-3"
    return ""


MISSING = what_is_missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    only_in_the_whole_suite,
    pytest.mark.skipif(bool(MISSING), reason=f"no power cuts: {MISSING}"),
]


class Disk:
    """A mounted folder whose power can be cut."""

    def __init__(self, folder: Path, process: "subprocess.Popen[str]") -> None:
        self.folder = folder
        self._process = process

    def cut_power(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{random.randrange(2**32)} {' '.join(random.choice(LEFT))}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "cut\n"


@contextmanager
def mounted(folder: Path, deaf: str) -> Generator[Disk]:
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.powercut_fs", str(folder), *([deaf] if deaf else [])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    give_up = time.monotonic() + MOUNT_SECONDS_MAX
    try:
        while not os.path.ismount(folder):
            assert process.poll() is None
            assert time.monotonic() < give_up
            time.sleep(0.05)
        yield Disk(folder, process)
    finally:
        subprocess.run(["umount", "-l", str(folder)], timeout=60, check=False)
        with process:
            process.kill()


async def cut_again_and_again(disk: Disk, forge: Forge, cuts: int, row: Row) -> None:
    def started(target: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(disk.folder, "--listen", target, forge=forge)

    async def disturb(_: int) -> None:
        nonlocal server
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(disk.cut_power)
        server = await asyncio.to_thread(started, server.target)

    server = await asyncio.to_thread(started)
    try:
        await work_through(disturb, cuts, row, target=server.target, workers=4)
    finally:
        server.kill()


async def test_no_power_cut_takes_what_was_acknowledged(tmp_path: Path, forge: Forge) -> None:
    with mounted(tmp_path / "disk", deaf="") as disk:
        await cut_again_and_again(disk, forge, CUTS, TALLY.row("power cut under a server, FUSE"))


@pytest.mark.parametrize("deaf", ["files", "folders"])
async def test_a_sync_that_does_nothing_is_found(tmp_path: Path, forge: Forge, deaf: str) -> None:
    with mounted(tmp_path / "disk", deaf) as disk, pytest.raises((Lost, KVStoreError)):
        await cut_again_and_again(disk, forge, CUTS_OF_A_CANARY, Row(f"power cut, {deaf} not synced"))
