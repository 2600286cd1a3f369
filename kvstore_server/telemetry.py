"""Prometheus metrics of one server: calls as the ecosystem names them, and what the store does and holds.

Labels are bounded: methods and codes by the protocol, codecs by `codec_label`, lanes by the scheduler.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvstore_codecs.spec import CodecSpec
from kvstore_server.redaction import pseudonym

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64)
ERRORS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SIGNED_ERRORS = (-1, -0.3, -0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1, 0.3, 1)
RECALLS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass
class Outcome:
    code: str = "OK"
    tenant: str | None = None
    """None while nobody knows whose call it is."""


def codec_label(spec: CodecSpec) -> str:
    """Names without rates: `rotated`, or `qjl/affine` for keys and values."""
    return spec.keys.name if spec.keys.name == spec.values.name else f"{spec.keys.name}/{spec.values.name}"


class Telemetry:
    """One registry, so that two servers in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._started = self._counter("grpc_server_started", "Calls that began, by method", "grpc_method")
        self._handled = self._counter("grpc_server_handled", "Calls by method and code", "grpc_method", "grpc_code")
        self._handling = self._histogram("grpc_server_handling_seconds", "Seconds of a call", SECONDS, "grpc_method")

        self._tenants = self._counter("kvstore_tenant_calls", "Calls by hashed tenant and code", "tenant", "grpc_code")

        self._steps = self._counter("kvstore_attend_steps", "Steps of Attend streams by code", "code")
        self._step_ok = self._steps.labels("OK")
        self._step_seconds = self._histogram(
            "kvstore_attend_step_seconds", "From a step's arrival to its answer", SECONDS
        )

        self._tokens = self._counter("kvstore_appended_tokens", "Tokens that were committed", "codec")
        self._raw_bytes = self._counter("kvstore_appended_raw_bytes", "Their bytes in the session's dtype", "codec")
        self._stored_bytes = self._counter("kvstore_appended_stored_bytes", "Bytes of their objects", "codec")
        self.commit_seconds = self._histogram("kvstore_commit_seconds", "To write one append durably", SECONDS)

        self.load_seconds = self._histogram("kvstore_load_seconds", "To read a session's rows from the store", SECONDS)
        self.evictions = self._counter("kvstore_evictions", "Sessions whose rows left host memory for others")

        self._queue = self._histogram("kvstore_queue_seconds", "That work waited for the device", SECONDS, "lane")
        self._run = self._histogram("kvstore_run_seconds", "Of one run of the device", SECONDS, "lane")
        self._items = self._histogram("kvstore_run_items", "Pieces of work that one run answered", BATCH_ITEMS, "lane")
        self._lanes: dict[str, tuple[Histogram, Histogram, Histogram]] = {}

        self._error = self._histogram(
            "kvstore_quality_relative_error", "Of attention, to the exact one, sampled", ERRORS, "codec"
        )
        self._lse_error = self._histogram(
            "kvstore_quality_lse_error", "Answered minus exact log-sum-exp, sampled", SIGNED_ERRORS, "codec"
        )
        self._recall = self._histogram(
            "kvstore_quality_top_k_recall", "Share of the exact top k that was answered, sampled", RECALLS, "codec"
        )

    @contextmanager
    def call(self, method: str) -> Iterator["Outcome"]:
        """Counts and times one call; `code` may be set until it ends."""
        outcome, began = Outcome(), perf_counter()
        self._started.labels(method).inc()
        try:
            yield outcome
        finally:
            self._handled.labels(method, outcome.code).inc()
            if outcome.tenant is not None:
                self._tenants.labels(pseudonym(outcome.tenant), outcome.code).inc()
            self._handling.labels(method).observe(perf_counter() - began)

    def step(self, code: str, seconds: float) -> None:
        """One step of an Attend stream was answered."""
        (self._step_ok if code == "OK" else self._steps.labels(code)).inc()
        self._step_seconds.observe(seconds)

    def appended(self, spec: CodecSpec, tokens: int, raw_bytes: int, stored_bytes: int) -> None:
        codec = codec_label(spec)
        self._tokens.labels(codec).inc(tokens)
        self._raw_bytes.labels(codec).inc(raw_bytes)
        self._stored_bytes.labels(codec).inc(stored_bytes)

    def ran(self, lane: str, queued_seconds: Sequence[float], seconds: float) -> None:
        """One run of the device, for pieces of work that had waited so long."""
        if lane not in self._lanes:  # looking labels up takes longer than observing
            self._lanes[lane] = self._queue.labels(lane), self._run.labels(lane), self._items.labels(lane)
        queue, run, items = self._lanes[lane]
        for waited in queued_seconds:
            queue.observe(waited)
        run.observe(seconds)
        items.observe(len(queued_seconds))

    def attended(self, codec: str, relative_error: float, lse_error: float) -> None:
        """One sampled answer of Attend, beside the exact one."""
        self._error.labels(codec).observe(relative_error)
        self._lse_error.labels(codec).observe(lse_error)

    def recalled(self, codec: str, recall: float) -> None:
        """One sampled answer of TopK, beside the exact one."""
        self._recall.labels(codec).observe(recall)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)
