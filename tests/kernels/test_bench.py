import json
from pathlib import Path

import pytest

from kvstore_kernels.bench import run


def test_every_row_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path / "table.json", tokens=64, rounds=1)
    written = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    assert {"attend 256 bits", "score 256 bits", "encode", "decode"} <= {row.name for row in rows}
    printed = capsys.readouterr().out
    assert all(row.name in printed and row.ratio > 0 for row in rows)
