import pytest

from .tally import TALLY


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TALLY.rows:
        terminalreporter.section("faults")
        for line in TALLY.lines():
            terminalreporter.write_line(line)
