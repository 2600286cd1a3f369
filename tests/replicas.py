"""Servers over one store, on loopback: processes that keep their addresses when they are started again."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .program import free_port
from .running import ServerProcess
from .server_forge import Forge


class Replicas:
    """`count` of one forge, with the same arguments and environment."""

    def __init__(
        self,
        count: int,
        forge: Forge,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        logs: Path | None = None,
    ) -> None:
        """With a folder for `logs` they have metrics, too."""
        self._count, self._forge = count, forge
        self._arguments, self._environment, self._logs = arguments, environment, logs
        self.metrics = [f"127.0.0.1:{free_port()}" for _ in range(count)] if logs else []
        self.processes: list[ServerProcess] = []

    def start(self) -> None:
        """All at once, until they serve."""
        with ThreadPoolExecutor(self._count) as threads:
            starting = [threads.submit(self._started, number, "127.0.0.1:0") for number in range(self._count)]
        self.processes = [each.result() for each in starting if each.exception() is None]
        for each in starting:
            each.result()

    @property
    def targets(self) -> list[str]:
        return [process.target for process in self.processes]

    def kill(self, number: int) -> None:
        self.processes[number].kill()

    def start_again(self, number: int) -> None:
        self.processes[number] = self._started(number, self.processes[number].target)

    def kill_all(self) -> None:
        for process in self.processes:
            process.kill()

    def _started(self, number: int, target: str) -> ServerProcess:
        metrics = ("--metrics", self.metrics[number]) if self.metrics else ()
        arguments = (*self._arguments, "--listen", target, *metrics)
        log = self._logs and self._logs / f"replica-{number}.log"
        return ServerProcess(*arguments, env=self._environment, forge=self._forge, log=log)
