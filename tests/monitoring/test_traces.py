import json
import logging
from pathlib import Path

import pytest
import torch

from kvstore_client import AsyncKVStoreClient, KVStoreError
from kvstore_codecs.named import shape_named
from kvstore_server.log import JsonLines
from kvstore_server.monitoring.traces import trace_id, traced

from ..running import serving

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADER = ("traceparent", f"00-{TRACE}-b7ad6b7169203331-01")


def test_a_log_line_carries_the_trace_of_its_call() -> None:
    def line() -> dict[str, str]:
        return json.loads(JsonLines().format(logging.LogRecord("n", 20, "p", 1, "text", (), None)))

    with traced("Append", [("x", b"\0"), HEADER]):
        assert line()["trace_id"] == TRACE
    assert "trace_id" not in line()


@pytest.mark.parametrize(
    "value", ["", "00-xyz", f"00-{TRACE}-b7ad6b7169203331", f"00-{TRACE.upper()}-b7ad6b7169203331-01"]
)
def test_what_is_no_trace_context_is_none(value: str) -> None:
    with traced("Append", [("traceparent", value)]):
        assert trace_id() == ""


async def test_a_span_of_the_caller_goes_on_in_the_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    caplog.set_level("DEBUG", "kvstore_server.rpc")
    async with serving(tmp_path) as server, AsyncKVStoreClient(f"127.0.0.1:{server.port}") as client:
        with trace.get_tracer("test").start_as_current_span("decode") as caller:
            session = await client.create_session("s", shape_named("1x1x2x32"))
            with pytest.raises(KVStoreError):
                await session.topk(0, torch.randn(1, 2, 32), 5, end=9)
    mine = caller.get_span_context()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    for name in ("kvstore/CreateSession", "kvstore/TopK"):
        parent = spans[name].parent
        assert parent is not None
        assert (parent.trace_id, parent.span_id) == (mine.trace_id, mine.span_id)
    assert any("TopK answers OUT_OF_RANGE" in record.getMessage() for record in caplog.records)
