"""A loopback that belongs to the tests and to what they start: from it no other machine is reached."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from .daemon import docker
from .images import LOOPBACK
from .tools import FOLDER

CLONE_NEWNET = 0x40000000
REPLICAS = ("127.0.0.21", "127.0.0.22")
"""As in own_address.sh."""
NAMES = {"kvstore": REPLICAS, **dict.fromkeys(("redis", "envoy", "prometheus", "minio"), ("127.0.0.1",))}
"""What the services of the stack are called in its files."""


@contextmanager
def loopback() -> Iterator[None]:
    """Of a container that answers for NAMES. This thread, and what it starts, is in there meanwhile."""
    hosts = FOLDER / "stack_hosts"
    hosts.write_text("".join(f"{address} {name}\n" for name, addresses in NAMES.items() for address in addresses))
    options = ("--network=none", "--dns=127.0.0.1", f"--volume={hosts}:/etc/stack_hosts:ro")
    container = docker("run", "--detach", "--rm", "--name=kvstore-loopback", *options, LOOPBACK).strip()
    number = docker("inspect", "--format={{.State.Pid}}", container).strip()
    with open("/proc/self/ns/net") as outside, open(f"/proc/{number}/ns/net") as inside:
        _enter(inside.fileno())
        try:
            yield
        finally:
            _enter(outside.fileno())
            docker("rm", "--force", container)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
