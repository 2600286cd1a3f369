"""HTTP for operators: /metrics for Prometheus, /live and /ready for probes, / for people."""

from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvstore_server.config import Address
from kvstore_server.monitoring.page import POLICY

REQUEST_SECONDS = 10
"""A client that says nothing for so long is gone."""


@dataclass(frozen=True)
class Probes:
    """What /live and /ready answer: 200 or 503."""

    live: Callable[[], bool]
    """Whether the process is worth keeping."""
    ready: Callable[[], bool]
    """Whether it is to be sent new calls."""


class Web:
    """Answers GET on `address` from threads of its own until it is closed."""

    def __init__(
        self,
        address: Address,
        registry: CollectorRegistry,
        page: Callable[[], str],
        probes: Probes,
        policy: str = POLICY,
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    encode, kind = choose_encoder(self.headers.get("Accept") or "")
                    self._answer(200, kind, encode(registry))
                elif path == "/":
                    self._answer(200, "text/html; charset=utf-8", page().encode())
                elif path in ("/live", "/ready"):
                    holds = getattr(probes, path[1:])()
                    self._answer(200 if holds else 503, "text/plain", b"yes\n" if holds else b"no\n")
                else:
                    self._answer(404, "text/plain", b"/, /metrics, /live and /ready are here\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                for name, value in (
                    ("Content-Type", kind),
                    ("Content-Length", str(len(body))),
                    ("Content-Security-Policy", policy),
                    ("X-Content-Type-Options", "nosniff"),
                    ("Cache-Control", "no-store"),
                ):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are no news."""

        self._server = ThreadingHTTPServer((address.host, address.port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="kvstore-web", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(REQUEST_SECONDS)
