import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore_server.audit import FAILURES_PER_SECOND_MAX, AuditLog
from kvstore_server.redaction import Redactor, pseudonym


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


Open = Callable[..., AuditLog]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the log of the test again and again; closed at its end."""
    logs: list[AuditLog] = []

    def open_log(*secrets: str, clock: Callable[[], float] = lambda: 1_790_000_000.5) -> AuditLog:
        logs.append(AuditLog(tmp_path / "audit", Redactor(secrets), clock))
        return logs[-1]

    yield open_log
    for log in logs:
        log.close()


def note(log: AuditLog, what: str = "DeleteSession", tenant: str | None = "acme", **facts: str) -> None:
    log.record(
        who="key 1", tenant=tenant, what=what, target=facts.get("target", "s"), result="OK", peer="ipv4:1.2.3.4:5"
    )


def test_a_line_says_who_did_what_when_and_what_came_of_it(tmp_path: Path, opened: Open) -> None:
    log = opened()
    note(log)
    assert lines(tmp_path / "audit") == [
        {
            "time": "2026-09-21T14:13:20.500+00:00",
            "who": "key 1",
            "tenant": pseudonym("acme"),
            "peer": "ipv4:1.2.3.4:5",
            "what": "DeleteSession",
            "target": "s",
            "result": "OK",
        }
    ]
    assert (tmp_path / "audit").stat().st_mode & 0o777 == 0o600


def test_what_is_there_is_never_overwritten_and_several_may_append(tmp_path: Path, opened: Open) -> None:
    logs = [opened() for _ in range(2)]
    for number in range(6):
        note(logs[number % 2], target=str(number))
    note(opened(), target="6")
    assert [line["target"] for line in lines(tmp_path / "audit")] == [str(number) for number in range(7)]


def test_a_file_that_was_moved_away_is_begun_again(tmp_path: Path, opened: Open) -> None:
    log = opened()
    note(log)
    (tmp_path / "audit").rename(tmp_path / "audit.1")
    note(log)
    assert len(lines(tmp_path / "audit")) == len(lines(tmp_path / "audit.1")) == 1


def test_a_line_is_one_line_and_holds_no_secret(tmp_path: Path, opened: Open) -> None:
    log = opened("canary-value")
    note(log, target='x\n{"who": "forged"}\ncanary-value')
    (line,) = lines(tmp_path / "audit")
    assert line["who"] == "key 1"
    assert "canary-value" not in line["target"]


def test_strangers_cannot_fill_the_disk(tmp_path: Path, opened: Open) -> None:
    now = [1000.0]
    log = opened(clock=lambda: now[0])
    for _ in range(10 * FAILURES_PER_SECOND_MAX):
        note(log, tenant=None)
    assert len(lines(tmp_path / "audit")) == FAILURES_PER_SECOND_MAX
    note(log)
    now[0] += 1
    note(log, tenant=None)
    tail = lines(tmp_path / "audit")[FAILURES_PER_SECOND_MAX:]
    assert [line.get("failures_left_out", 0) for line in tail] == [9 * FAILURES_PER_SECOND_MAX, 0]


def test_lines_that_cannot_be_written_are_counted(
    tmp_path: Path, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    log = opened()
    (tmp_path / "audit").unlink()
    (tmp_path / "audit").mkdir()
    note(log)
    note(log)
    assert log.lost == 2
    assert caplog.text.count("cannot be written") == 1


def test_without_a_file_nothing_is_noted() -> None:
    log = AuditLog(None, Redactor())
    note(log)
    assert log.lost == 0
