"""Prometheus metrics of one server: calls as the ecosystem names them, and what the store holds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import HTTPServer
from threading import Thread
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from kvstore_server.config import Address
from kvstore_server.redaction import pseudonym

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass
class Outcome:
    code: str = "OK"
    tenant: str | None = None
    """None while nobody knows whose call it is."""


class Telemetry:
    """One registry, so that two servers in one process do not share counters."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.handled = Counter(
            "grpc_server_handled", "Calls by method and code", ["grpc_method", "grpc_code"], registry=self.registry
        )
        self.tenants = Counter(
            "kvstore_tenant_calls", "Calls by tenant (hashed) and code", ["tenant", "grpc_code"], registry=self.registry
        )
        self.seconds = Histogram(
            "grpc_server_handling_seconds",
            "Seconds of a call",
            ["grpc_method"],
            buckets=SECONDS,
            registry=self.registry,
        )

    @contextmanager
    def call(self, method: str) -> Iterator["Outcome"]:
        """Counts and times one call; `code` may be set until it ends."""
        outcome, began = Outcome(), perf_counter()
        try:
            yield outcome
        finally:
            self.handled.labels(method, outcome.code).inc()
            if outcome.tenant is not None:
                self.tenants.labels(pseudonym(outcome.tenant), outcome.code).inc()
            self.seconds.labels(method).observe(perf_counter() - began)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A value that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def serve(self, address: Address) -> tuple[HTTPServer, Thread]:
        """Answers GET /metrics on `address` from a thread of its own until the server is shut down."""
        return start_http_server(address.port, address.host, registry=self.registry)
