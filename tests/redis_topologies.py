"""Redis as operators run it: over TLS, with sentinels, as a cluster: real servers that end with the tests."""

import socket
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import trustme
from redis import Redis
from redis.exceptions import RedisError

from .redis_server import RedisServer

SERVICE = "index"
DOWN_MILLISECONDS = 500
"""A server that is silent for so long is taken to be gone."""
SETTLE_SECONDS_MAX = 60
SLOTS = 16384


class Sentinels:
    """A primary, a replica of it, and three sentinels that replace the one by the other."""

    def __init__(self, binary: Path, stack: ExitStack) -> None:
        self.ports = free_ports(5)
        self.servers = [_started(binary, stack, port, "--repl-diskless-sync-delay", "0") for port in self.ports[:2]]
        self.url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.ports[2:])}/{SERVICE}"
        _execute(self.ports[1], "REPLICAOF", "127.0.0.1", self.ports[0])
        for port in self.ports[2:]:
            stack.enter_context(_sentinel(binary, port, self.ports[0]))
        self.wait_until_whole()

    @property
    def primary(self) -> int:
        """Which of the servers the sentinels name."""
        _, port = _execute(self.ports[2], "SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return self.ports.index(int(port))

    def wait_until_whole(self) -> None:
        """Until the replica has all there is, and the sentinels know it and each other."""

        def whole() -> bool:
            primary = self.primary
            if "online" not in str(_execute(self.ports[primary], "INFO", "replication")):
                return False
            expected = {"num-slaves": "1", "num-other-sentinels": "2"}
            return all(
                _said(port, name, "SENTINEL", "MASTER", SERVICE) == value
                for port in self.ports[2:]
                for name, value in expected.items()
            )

        wait_for(whole)

    def fail_over(self) -> None:
        """The primary dies; returns when the sentinels have another."""
        dead = self.primary
        self.servers[dead].stop()
        wait_for(lambda: self.primary != dead)

    def heal(self) -> None:
        """What died comes back, empty, as a replica."""
        for server in self.servers:
            if server.process is None:
                server.start()
        self.wait_until_whole()


class Cluster:
    """Three primaries, the first with all of one tenant's keys, and one replica of that."""

    def __init__(self, binary: Path, stack: ExitStack, tenant: str = "default") -> None:
        ports = [port for port in free_ports(12) if port < 50_000][:4]  # the bus has the port 10,000 above
        assert len(ports) == 4
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(DOWN_MILLISECONDS))
        self.servers = [_started(binary, stack, port, *options) for port in ports]
        self.url = f"redis+cluster://{','.join(f'127.0.0.1:{port}' for port in ports)}"
        home = int(_execute(ports[0], "CLUSTER", "KEYSLOT", f"{{{tenant}}}"))
        first, last = home // 5461 * 5461, min(home // 5461 * 5461 + 5460, SLOTS - 1)
        others = [slot for slot in range(SLOTS) if not first <= slot <= last]
        for port, slots in zip(ports, (range(first, last + 1), others[::2], others[1::2]), strict=False):
            _execute(port, "CLUSTER", "ADDSLOTS", *slots)
        for port in ports[1:]:
            _execute(ports[0], "CLUSTER", "MEET", "127.0.0.1", port)
        wait_for(lambda: all(_said(port, "cluster_known_nodes", "CLUSTER", "INFO") == "4" for port in ports))
        _execute(ports[3], "CLUSTER", "REPLICATE", _text(_execute(ports[0], "CLUSTER", "MYID")))
        wait_for(lambda: all(_said(port, "cluster_state", "CLUSTER", "INFO") == "ok" for port in ports))
        wait_for(lambda: "online" in str(_execute(ports[0], "INFO", "replication")))
        self._ports = ports

    def fail_over(self) -> None:
        self.servers[0].stop()
        wait_for(lambda: _said(self._ports[3], "role", "INFO", "replication") == "master")


@contextmanager
def over_tls(binary: Path) -> Generator[tuple[str, Path]]:
    """The url of a server that talks TLS only, and the file of its authority's certificate."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
        (port,) = free_ports(1)
        files = [f"--tls-{kind}-file" for kind in ("cert", "key")]
        options = [*("--tls-port", str(port)), *(word for name in files for word in (name, str(folder / "server.pem")))]
        options += ["--tls-ca-cert-file", str(folder / "ca.pem"), "--tls-auth-clients", "no"]
        _started(binary, stack, None, *options)
        yield f"rediss://127.0.0.1:{port}", folder / "ca.pem"


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; what does not answer yet counts as no."""
    give_up = time.monotonic() + SETTLE_SECONDS_MAX
    while time.monotonic() < give_up:
        try:
            if condition():
                return
        except (RedisError, OSError):
            pass
        time.sleep(0.02)
    raise TimeoutError("the servers did not settle")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def _started(binary: Path, stack: ExitStack, port: int | None, *options: str) -> RedisServer:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
    at_port = () if port is None else ("--port", str(port), "--bind", "127.0.0.1")
    server = RedisServer(binary, folder, *at_port, *options)
    stack.callback(server.stop)
    server.start()
    return server


@contextmanager
def _sentinel(binary: Path, port: int, primary_port: int) -> Generator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        folder = Path(name)
        (folder / "sentinel.conf").write_text(
            f"bind 127.0.0.1\nport {port}\ndir {folder}\nunixsocket {folder}/redis.sock\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary_port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_MILLISECONDS}\n"
            f"sentinel failover-timeout {SERVICE} 4000\n"
        )
        server = RedisServer(binary, folder, command=[str(folder / "sentinel.conf"), "--sentinel"])
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _execute(port: int, *words: object) -> Any:
    with Redis(port=port, socket_timeout=5) as client:
        return client.execute_command(*words)


def _said(port: int, name: str, *words: object) -> str:
    """One field of an answer that has names, or lines of `name:value`."""
    answer = _execute(port, *words)
    if isinstance(answer, bytes):
        answer = dict(line.split(":", 1) for line in answer.decode().split("\r\n") if ":" in line)
    return next(_text(value) for key, value in answer.items() if _text(key) == name)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
