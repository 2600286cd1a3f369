"""Options of the fuzzers."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", dest="fuzz_seed", type=int, help="makes the fuzzed calls of that seed")
    parser.addoption("--replay", dest="replay", action="append", help="plays a fuzzed call from its file alone")
