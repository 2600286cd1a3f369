"""The caller's trace context in a call's metadata, where the program uses OpenTelemetry."""

import sys


def trace_headers() -> tuple[tuple[str, str], ...]:
    """W3C `traceparent` of the current span; nothing in a program that has not imported OpenTelemetry."""
    propagate = sys.modules.get("opentelemetry.propagate")
    if propagate is None:
        return ()
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return tuple(headers.items())
