"""How often each fault is brought about, and what came of it: the table at the end of `make test-faults`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

WHOLE_SUITE = os.environ.get("KVSTORE_TIER") == "F"
only_in_the_whole_suite = pytest.mark.skipif(not WHOLE_SUITE, reason="takes long: make test-faults")


def times(few: int, many: int) -> int:
    """`few` in a plain test run, `many` when KVSTORE_TIER=F asks for the whole suite."""
    return many if WHOLE_SUITE else few


@dataclass
class Row:
    fault: str
    cycles: int = 0
    operations: int = 0
    losses: int = 0

    def step(self, total: int) -> None:
        """One more cycle of so many; a line now and then says how far it is."""
        self.cycles += 1
        if self.cycles % max(1, total // 10) == 0:
            print(f"{self.fault}: {self.cycles:,} of {total:,}", flush=True)


@dataclass
class Tally:
    """One row for each kind of fault; a test that fails counts as a loss of its row."""

    rows: dict[str, Row] = field(default_factory=dict)

    def row(self, fault: str) -> Row:
        return self.rows.setdefault(fault, Row(fault))

    def lines(self) -> list[str]:
        table = [("fault", "cycles", "operations checked", "losses")]
        table += [
            (row.fault, f"{row.cycles:,}", f"{row.operations:,}", f"{row.losses:,}") for row in self.rows.values()
        ]
        return aligned(table)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """A line a row: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in table
    ]


TALLY = Tally()
