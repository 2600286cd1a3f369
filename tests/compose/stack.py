"""The repository's stack as one of its compose files makes it, with tests/compose/loopback.yml put over it."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..project_rules import ROOT
from .daemon import ENVIRONMENT, remove_volumes
from .images import torch_wheels
from .tools import FOLDER, run

LOGS = FOLDER / "stack.log"
"""Of the stack that was last."""
UP_SECONDS, BUILD_SECONDS, DOWN_SECONDS = 300, 1800, 120


class Stack:
    """`docker compose` with the repository's file and, if there are some, others over it."""

    def __init__(self, *files: str) -> None:
        over = ["loopback.yml", "loopback.s3.yml"] if "deploy/compose.s3.yml" in files else ["loopback.yml"]
        names = ["docker-compose.yml", *files, *(f"tests/compose/{name}" for name in over)]
        self._files = [part for name in names for part in ("--file", name)]
        self._envoy = FOLDER / "envoy.yaml"
        text = (ROOT / "deploy" / "envoy.yaml").read_text()
        self._envoy.write_text(text.replace("address: 0.0.0.0", "address: 127.0.0.1"))

    def compose(self, *arguments: str, timeout: float = 60.0) -> str:
        """What the command printed."""
        environment = {
            **ENVIRONMENT,
            "TESTS": str(Path(__file__).parent),
            "ENVOY_YAML": str(self._envoy),
            "TORCH_BACKEND": "" if torch_wheels() else "cpu",
        }
        return run("docker", "compose", *self._files, *arguments, timeout=timeout, cwd=ROOT, env=environment)

    @contextmanager
    def up(self) -> Iterator[None]:
        """Started and healthy; taken down at the end, with every volume but that of compiled code. Logs are kept."""
        try:
            self.start()
            yield
        finally:
            LOGS.write_text(self.compose("ps", "--all") + self.compose("logs", "--timestamps"))
            self.compose("--profile=*", "down", "--remove-orphans", timeout=DOWN_SECONDS)
            remove_volumes()

    def start(self) -> None:
        """Builds what has changed."""
        waiting = ("--wait", "--wait-timeout", str(UP_SECONDS))
        self.compose("up", "--detach", "--build", *waiting, timeout=BUILD_SECONDS + UP_SECONDS)

    def containers(self, *services: str) -> list[dict[str, Any]]:
        """What `docker inspect` says of every one, those that have ended included."""
        numbers = self.compose("ps", "--all", "--quiet", *services).split()
        return json.loads(run("docker", "inspect", *numbers, timeout=60, env=ENVIRONMENT))

    def key(self) -> str:
        """As docs/operations.md says."""
        return self.compose("run", "--rm", "-T", "keys", "cat", "/keys/writer").splitlines()[-1]


def images(stack: Stack) -> dict[str, str]:
    """Of each service, and of those that only start when asked."""
    services = json.loads(stack.compose("--profile=*", "config", "--format=json"))["services"]
    return {name: service["image"] for name, service in services.items()}


def service(container: dict[str, Any]) -> str:
    return container["Config"]["Labels"]["com.docker.compose.service"]


def kill(container: dict[str, Any]) -> None:
    """kill -9 of everything in it, by nobody that Docker knows: it is started again as after a crash."""
    os.kill(container["State"]["Pid"], signal.SIGKILL)


def until(what: Callable[[], bool], seconds: float, failure: str) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        if time.monotonic() > give_up:
            raise AssertionError(f"{failure} within {seconds} s")
        time.sleep(0.5)
