"""One private Docker for all of these tests, what they found, and proof that nothing of it is left."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from .daemon import daemon, leftovers
from .images import BASE, build_base, build_standins
from .loopback import loopback
from .stack import LOGS, Stack, images
from .tools import fetch

ROWS: list[tuple[str, str]] = []
BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-image", action="store_true", help="build the image for GPUs, too, and look at it")


def progress(text: str) -> None:
    print(f"{time.monotonic() - BEGUN:6.0f} s  {text}", flush=True)


@pytest.fixture(scope="session")
def tell() -> Callable[[str, object], None]:
    """Notes what was found, for the table at the end."""

    def note(what: str, found: object) -> None:
        ROWS.append((what, str(found)))
        progress(f"{what}: {found}")

    return note


@pytest.fixture(scope="session")
def private_docker(tell: Callable[[str, object], None]) -> Iterator[None]:
    """A daemon with every image that is pulled elsewhere, and this process on the loopback that containers share."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as on Ctrl-C, and take everything down
    assert os.geteuid() == 0, "a Docker daemon needs the superuser"
    progress("fetching Docker")
    fetch()
    try:
        with daemon():
            assert leftovers(), "the daemon that runs is not seen"
            progress(f"making {BASE} of Debian's packages")
            build_base()
            build_standins(images(Stack("deploy/compose.s3.yml")), progress)
            with loopback():
                yield
    finally:
        left = leftovers()
        tell("left running or mounted", ", ".join(left) or "nothing")
        assert not left


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("docker compose")
    width = max(len(what) for what, _ in ROWS)
    for what, found in ROWS:
        terminalreporter.write_line(f"{what.ljust(width)}  {found}")
    terminalreporter.write_line(
        "stand-ins: Debian's Python, Redis and Prometheus, PyPI's Envoy, moto for MinIO; Grafana is left out"
    )
    terminalreporter.write_line(f"logs: {LOGS}")
