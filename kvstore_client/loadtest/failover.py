"""Replicas of the load test's own, over one folder, killed and started again in turn while the load goes on."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from kvstore_client.demo.server import ServerProcess

REPLICAS = 2
KILLS_AT = (0.2, 0.6)
"""Of the load's seconds."""


@dataclass(frozen=True)
class Kill:
    """One replica's `kill -9`: seconds after the load began, and until the replica served again."""

    replica: int
    at_seconds: float
    back_after_seconds: float


class Replicas:
    """Any of them is right for any call."""

    def __init__(self, folder: Path) -> None:
        settings = {name: value for name, value in os.environ.items() if name.startswith("KVSTORE__")}
        self._servers = [ServerProcess(folder, settings) for _ in range(REPLICAS)]

    def start(self) -> None:
        for server in self._servers:
            server.start()

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(server.target for server in self._servers)

    def stop(self) -> None:
        for server in self._servers:
            server.stop()

    @contextmanager
    def killed(self, seconds: float) -> Iterator[list[Kill]]:
        """Meanwhile kills each replica once, in a thread, and starts it again; raises what kept one from starting."""
        kills: list[Kill] = []
        failed: list[Exception] = []
        stop = threading.Event()

        def run() -> None:
            begun = monotonic()
            for replica, share in enumerate(KILLS_AT):
                if stop.wait(max(0.0, begun + share * seconds - monotonic())):
                    return
                at = monotonic() - begun
                try:
                    self._servers[replica].kill()
                    kills.append(Kill(replica, at, self._servers[replica].start()))
                except Exception as error:
                    failed.append(error)
                    return

        thread = threading.Thread(target=run, name="killing", daemon=True)
        thread.start()
        try:
            yield kills
        finally:
            stop.set()
            thread.join()
        if failed:
            raise failed[0]


@contextmanager
def replicas() -> Iterator[Replicas]:
    """Started, and stopped at the end; their data goes with them."""
    with tempfile.TemporaryDirectory(prefix="kvstore-loadtest-") as folder:
        own = Replicas(Path(folder))
        try:
            own.start()
            yield own
        finally:
            own.stop()
