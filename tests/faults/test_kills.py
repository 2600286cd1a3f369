"""One server over a local folder, killed or stopped under load again and again: every acknowledged append is there."""

import asyncio
from pathlib import Path

import pytest

from ..running import ServerProcess
from ..server_forge import Forge
from .tally import TALLY, only_in_the_whole_suite
from .workload import work_through

pytestmark = [pytest.mark.slow, only_in_the_whole_suite]


@pytest.mark.parametrize(("signal", "cycles"), [("kill", 200), ("terminate", 100)])
async def test_what_was_acknowledged_is_there_after_every_restart(
    tmp_path: Path, forge: Forge, signal: str, cycles: int
) -> None:
    def started(target: str = "127.0.0.1:0") -> ServerProcess:
        return ServerProcess(tmp_path, "--listen", target, forge=forge)

    async def disturb(_: int) -> None:
        nonlocal server
        if signal == "kill":
            await asyncio.to_thread(server.kill)
        else:
            assert await asyncio.to_thread(server.terminate) == 0
        server = await asyncio.to_thread(started, server.target)

    row = TALLY.row("kill -9 of a server, local" if signal == "kill" else "SIGTERM of a server, local")
    server = await asyncio.to_thread(started)
    try:
        await work_through(disturb, cycles, row, target=server.target, workers=8)
    finally:
        server.kill()
