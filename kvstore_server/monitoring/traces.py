"""Whose work this is: the W3C trace context of a call's metadata, for log lines and, with extra `otel`, spans."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:  # the extra `otel` is not installed
    propagate = trace = None

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
_trace_id: ContextVar[str] = ContextVar("trace_id", default="")


def trace_id() -> str:
    """Of the call that this code works for; empty if the caller named none."""
    return _trace_id.get()


@contextmanager
def traced(method: str, metadata: Iterable[tuple[str, str | bytes]] | None) -> Iterator[None]:
    """One call: its log lines carry the caller's trace id, and it is a span of that trace."""
    headers = {key: value for key, value in metadata or () if isinstance(value, str)}
    match = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    token = _trace_id.set(match[1] if match else "")
    try:
        if trace is None or propagate is None:
            yield
            return
        tracer, parent = trace.get_tracer("kvstore"), propagate.extract(headers)
        attributes = {"rpc.system": "grpc", "rpc.method": method}
        kind = trace.SpanKind.SERVER
        with tracer.start_as_current_span(f"kvstore/{method}", parent, kind, attributes):
            yield
    finally:
        _trace_id.reset(token)


def export_spans(endpoint: str) -> None:
    """Sends spans to an OpenTelemetry collector (http://host:4317) over OTLP; RuntimeError without the extra `otel`."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise RuntimeError(f"log.spans_endpoint needs pip install 'remote-kv-store[otel]': {error}") from None
    provider = TracerProvider(resource=Resource.create({"service.name": "kvstore"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    assert trace is not None
    trace.set_tracer_provider(provider)
