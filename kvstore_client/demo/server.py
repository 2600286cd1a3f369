"""A server process of the demo's own: `kvstore serve` on a free loopback port and a folder."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from types import MappingProxyType

from kvstore_client import KVStoreClient, KVStoreError

START_SECONDS = 300.0
STOP_SECONDS = 15.0


class ServerFailed(Exception):
    """The server did not start; the text ends with what it logged."""


class ServerProcess:
    """Starts, is killed, starts again on the same port and data. `settings` are KVSTORE__SECTION__KEY variables."""

    def __init__(self, folder: Path, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self._settings = settings
        self._data, self._log = folder / "data", folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.target = f"127.0.0.1:{_free_port()}"

    def start(self) -> float:
        """Returns the seconds until it serves."""
        begun = monotonic()
        command = [sys.executable, "-m", "kvstore_server.cli", "serve"]
        command += ["--data", str(self._data), "--listen", self.target, "--metrics", "off"]
        settings = {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE")}
        settings |= self._settings
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=settings)
        with KVStoreClient(self.target) as client:
            while monotonic() < begun + START_SECONDS and self._process.poll() is None:
                try:
                    client.server_info(timeout=1.0)
                except KVStoreError:
                    continue
                return monotonic() - begun
        self.stop()
        raise ServerFailed(f"the server does not serve:\n{self._log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """As `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if it takes longer than STOP_SECONDS."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
