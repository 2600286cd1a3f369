"""The audit log: who did what, when, and what came of it, one JSON object a line, only ever appended."""

import json
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from kvstore_server.redaction import Redactor, pseudonym

LOG = logging.getLogger(__name__)
FAILURES_PER_SECOND_MAX = 100
"""Of callers without identity, who could otherwise fill the disk; how many more there were is told by the next line."""


class _File(WatchedFileHandler):
    """Opens the file again when it was moved away, as log rotation does. What cannot be written is counted."""

    lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # from opening: what goes wrong in writing comes to handleError by itself
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.lost:
            LOG.critical("the audit log cannot be written")
        self.lost += 1

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600))


class AuditLog:
    """Lines are complete in the file, though not on the disk, before the call is answered. None writes nothing.

    Raises OSError if the file cannot be opened.
    """

    def __init__(self, file: Path | None, redact: Redactor, clock: Callable[[], float] = time.time) -> None:
        self._redact, self._clock = redact, clock
        self._second, self._failures, self._left_out = 0, 0, 0
        self._file = None if file is None else _File(file)

    @property
    def lost(self) -> int:
        """Lines that could not be written."""
        return 0 if self._file is None else self._file.lost

    def record(self, *, who: str, tenant: str | None, what: str, target: str, result: str, peer: str = "") -> None:
        """`what` was done to `target`; without a tenant nobody knows who it was."""
        if self._file is None or (tenant is None and not self._admit_failure()):
            return
        line = {
            "time": datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds"),
            "who": who,
            "tenant": None if tenant is None else pseudonym(tenant),
            "peer": peer,
            "what": what,
            "target": target,
            "result": result,
        }
        if self._left_out:
            line["failures_left_out"] = self._left_out
            self._left_out = 0
        self._file.handle(logging.makeLogRecord({"msg": self._redact(json.dumps(line))}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _admit_failure(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._failures = second, 0
        self._failures += 1
        admitted = self._failures <= FAILURES_PER_SECOND_MAX
        self._left_out += not admitted
        return admitted
