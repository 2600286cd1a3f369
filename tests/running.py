"""A real server for tests: in this event loop, or as a process of its own that can be killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from kvstore_server.app import Server
from kvstore_server.config import Settings, load

from .redis_server import DIE_WITH_PARENT
from .server_forge import Forge

CLI = ("-m", "kvstore_server.cli")
START_SECONDS = 240


def settings_for(data: Path, **sections: Mapping[str, object] | float) -> Settings:
    """Embedded defaults over `data`, on a free loopback port, CPU."""
    base: dict[str, Any] = {
        "storage": {"url": str(data)},
        "listen": {"address": "127.0.0.1:0", "metrics_address": None},
        "device": {"name": "cpu"},
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, Mapping) else section
    return load(None, base)


@asynccontextmanager
async def serving(data: Path, **sections: Mapping[str, object] | float) -> AsyncIterator[Server]:
    """A server in this loop, drained at the end."""
    server = Server(settings_for(data, **sections))
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


class ServerProcess:
    """`kvstore serve` on a free port. Every wait is bounded; the process is stopped by its id."""

    def __init__(
        self,
        data: Path | str,
        *args: str,
        env: Mapping[str, str] | None = None,
        forge: Forge | None = None,
        cli: Sequence[str] = CLI,
        log: Path | None = None,
    ) -> None:
        """Of a forge, the process is there sooner; it is the same in everything else. `log` gets what it writes."""
        arguments = [
            *("serve", "--data", str(data), "--listen", "127.0.0.1:0", "--metrics", "off", "--device", "cpu"),
            *args,
        ]
        environment = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", **(env or {})}
        readable, writable = os.pipe()
        try:
            if forge is None:
                command = [*(sys.executable, "-S", "-c", DIE_WITH_PARENT, sys.executable), *cli, *arguments]
                self._process = subprocess.Popen(command, stderr=writable, env={**os.environ, **environment})
            else:
                self._process = forge.start(arguments, environment, writable)
        finally:
            os.close(writable)
        self.lines: list[str] = []
        self._log = log
        self._queue: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._drain_stderr, args=[readable], daemon=True)
        self._reader.start()
        self.target = self._wait_for_address()

    def pause(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def ended(self, timeout_seconds: float = 60) -> int:
        """The exit code."""
        code = self._process.wait(timeout_seconds)
        self._reader.join(10)
        return code

    def terminate(self, timeout_seconds: float = 60) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.ended(timeout_seconds)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def _wait_for_address(self) -> str:
        while True:
            try:
                line = self._queue.get(timeout=START_SECONDS)
            except Empty:
                line = None
            if line is None:
                self.kill()
                raise RuntimeError("the server did not start:\n" + "".join(self.lines))
            if found := re.search(r"serving on (\S+),", line):
                return found[1]

    def _drain_stderr(self, readable: int) -> None:
        with open(readable, errors="replace") as lines, open(self._log or os.devnull, "a", buffering=1) as log:
            for line in lines:
                self.lines.append(line)
                self._queue.put(line)
                log.write(line)
        self._queue.put(None)


@contextmanager
def server_process(data: Path, *args: str) -> Iterator[ServerProcess]:
    process = ServerProcess(data, *args)
    try:
        yield process
    finally:
        if process.running:
            process.kill()
