"""Options of the fuzzers, and the table."""

import pytest

from ..faults.tally import WHOLE_SUITE
from .tally import Tally

TALLY = Tally()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", dest="fuzz_seed", type=int, help="makes the fuzzed calls of that seed")
    parser.addoption("--replay", dest="replay", action="append", help="plays a fuzzed call from its file alone")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "tests/security/" in report.nodeid:
        TALLY.add(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHOLE_SUITE and TALLY.rows:
        terminalreporter.section("security")
        for line in TALLY.lines():
            terminalreporter.write_line(line)
