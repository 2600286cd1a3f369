from collections.abc import Generator

import pytest

from ..server_forge import Forge
from .tally import TALLY


@pytest.fixture(scope="session")
def forge() -> Generator[Forge]:
    forge = Forge()
    yield forge
    forge.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.rows:
        terminalreporter.section("faults")
        for line in TALLY.lines():
            terminalreporter.write_line(line)
