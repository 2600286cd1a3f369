"""A program on loopback that dies with the tests, writes into a log and is stopped by its process id."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .redis_server import DIE_WITH_PARENT

STOP_SECONDS = 20.0
LOG_BYTES_SHOWN = 2000


class Program:
    """Started by the main thread, which it does not outlive, out of reach of the terminal's Ctrl-C."""

    def __init__(self, name: str, command: Sequence[str], port: int, log: Path) -> None:
        self.name, self.address, self.log = name, f"127.0.0.1:{port}", log
        with log.open("ab") as written:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", DIE_WITH_PARENT, *command],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                cwd=log.parent,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def wait(self, seconds: float, answers: Callable[[], bool] | None = None) -> None:
        """Until `answers`, by default that it accepts connections; RuntimeError if it ends or takes longer."""
        give_up = time.monotonic() + seconds
        while not (answers or self._accepts)():
            if not self.running or time.monotonic() > give_up:
                said = self.log.read_text(errors="replace")[-LOG_BYTES_SHOWN:]
                raise RuntimeError(f"{self.name} is not ready within {seconds:g} s:\n{said}")
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that takes long."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    def _accepts(self) -> bool:
        return accepts(self.address)


def accepts(address: str) -> bool:
    """Whether something on loopback accepts connections there."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]
