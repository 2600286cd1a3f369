"""The table counts what was tried and what was found."""

import pytest

from .tally import Tally


def report(name: str, outcome: str = "passed", when: str = "call", **facts: object) -> pytest.TestReport:
    nodeid = f"tests/security/test_{name}.py::test_x"
    properties = list(facts.items())
    return pytest.TestReport(nodeid, ("", 0, ""), {}, outcome, None, when, user_properties=properties, duration=2.0)  # type: ignore[arg-type]


def test_a_row_is_a_module_or_what_a_test_says_and_failures_are_findings() -> None:
    tally = Tally()
    for each in (
        report("slow_clients"),
        report("slow_clients", when="teardown"),
        report("slow_clients", "failed"),
        report("parsers", what="parser: codec", cases=5_000),
        report("parsers", "skipped", what="parser: object"),
    ):
        tally.add(each)
    assert tally.lines() == [
        "what           cases  found  seconds",
        "slow clients       2      1        6",
        "parser: codec  5,000      0        2",
    ]
