"""Log lines on standard error: text for people, one JSON object a line for machines, neither with secrets in it."""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

from kvstore_server.config import Log
from kvstore_server.redaction import Redactor, pseudonym

TENANT: ContextVar[str] = ContextVar("tenant")
"""Whose call is being answered; its lines carry the pseudonym."""


class Redacting(logging.Formatter):
    """Cuts secrets out of the whole of what another formatter makes, tracebacks included."""

    def __init__(self, inner: logging.Formatter, redact: Redactor) -> None:
        super().__init__()
        self._inner, self._redact = inner, redact

    def format(self, record: logging.LogRecord) -> str:
        return self._redact(self._inner.format(record))


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        tenant = TENANT.get(None)
        return super().formatMessage(record) + (f" (tenant {pseudonym(tenant)})" if tenant else "")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if tenant := TENANT.get(None):
            line["tenant"] = pseudonym(tenant)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log: Log, redact: Redactor) -> None:
    """Sends everything at or above the level to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Redacting(JsonLines() if log.format == "json" else TextLines(), redact))
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)
