"""HTTP for operators: /metrics for Prometheus, / for people."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from kvstore_server.config import Address
from kvstore_server.monitoring.page import POLICY

REQUEST_SECONDS = 10
"""A client that says nothing for so long is gone."""


class Web:
    """Answers GET on `address` from threads of its own until it is closed."""

    def __init__(
        self, address: Address, registry: CollectorRegistry, page: Callable[[], str], policy: str = POLICY
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
                else:
                    self._answer(404, "text/plain", b"/ and /metrics are here\n")

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
