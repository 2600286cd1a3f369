"""Log lines on standard error: text for people, one JSON object a line for machines."""

import json
import logging
import sys
from datetime import UTC, datetime

from kvstore_server.config import Log
from kvstore_server.monitoring.traces import export_spans, trace_id


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if found := trace_id():
            line["trace_id"] = found
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log: Log) -> None:
    """Sends everything at or above the level to standard error, and spans to where they are wanted."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log.format == "json" else text)
    logging.basicConfig(level=log.level.upper(), handlers=[handler], force=True)
    if log.spans_endpoint is not None:
        export_spans(log.spans_endpoint)
