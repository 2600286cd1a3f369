from pathlib import Path

import pytest

from kvstore_client.loadtest.trace import TraceRequest, read_trace

LINES = """\
{"timestamp": 4000, "input_length": 700, "output_length": 52, "hash_ids": [46, 47], "session_id": "x"}
{"timestamp": 1000, "input_length": 6755, "output_length": 500, "hash_ids": [0,1,2,3,4,5,6,7,8,9,10,11,12,13]}
{"timestamp": 9000, "input_length": 1, "output_length": 0, "hash_ids": [5]}
"""


def test_requests_are_due_from_the_first_on_and_are_scaled(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(LINES)
    whole = read_trace(file, speed=1, block_tokens=512, seconds=100)
    assert [(r.due, r.tokens, r.steps) for r in whole] == [(0, 6755, 500), (3, 700, 52), (8, 1, 1)]
    small = read_trace(file, speed=2, block_tokens=32, seconds=3)
    assert small == [TraceRequest(0.0, 422, 31, tuple(range(14))), TraceRequest(1.5, 44, 3, (46, 47))]


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"timestamp": 0, "input_length": 5, "output_length": 5}',
        '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": 7}',
    ],
)
def test_a_line_of_another_format_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(LINES + line + "\n")
    with pytest.raises(ValueError, match=r"trace.jsonl:4 is not of Mooncake's trace format"):
        read_trace(file, speed=1, block_tokens=512, seconds=100)
