"""What each security test tried, and what it found: the table at the end of `make test-security`.

A test module is a row. A test that tries many cases says so with `record_property("cases", n)`, and by "what" it gets a
row of its own; a test that fails has found something.
"""

from dataclasses import dataclass, field
from pathlib import PurePath

import pytest

from ..faults.tally import aligned


@dataclass
class Row:
    cases: int = 0
    found: int = 0
    seconds: float = 0.0


@dataclass
class Tally:
    """By what was tried."""

    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        facts = dict(report.user_properties)
        module = PurePath(report.nodeid.partition("::")[0]).stem.removeprefix("test_").replace("_", " ")
        row = self.rows.setdefault(str(facts.get("what", module)), Row())
        row.seconds += report.duration
        row.found += report.failed
        if report.when == "call" and not report.skipped:
            row.cases += int(str(facts.get("cases", 1)))

    def lines(self) -> list[str]:
        """Of what ran."""
        rows = {what: row for what, row in self.rows.items() if row.cases or row.found}
        cells = [(what, f"{row.cases:,}", f"{row.found:,}", f"{row.seconds:,.0f}") for what, row in rows.items()]
        return aligned([("what", "cases", "found", "seconds"), *cells])
