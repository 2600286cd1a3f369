"""A real S3 server for tests (moto), in a process of its own on loopback. It dies with them and fails when told to.

moto looks for a name before it creates it, and lists while it changes, without a lock: this one does so one by one.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal

FAULT_PATH = "/_fault/"
COUNTS_PATH = "/_counts"
Fault = Literal["none", "refuse", "lose", "hang", "overwrite", "unlisted"]
"""`refuse` answers 503; `lose` does what is asked and answers 503; `hang` answers late; `overwrite` ignores the
condition of a create; `unlisted` leaves out what was put."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
HANG_SECONDS = 1.5
App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class S3Server:
    """Where the server is; `bucket` makes a new one."""

    def __init__(self, endpoint: str, pid: int) -> None:
        self.endpoint, self.pid = endpoint, pid

    def bucket(self) -> str:
        """The url of a new, empty bucket."""
        name = f"b{secrets.token_hex(8)}"
        self._ask("PUT", f"/{name}")
        return f"s3://{name}"

    def fail(self, fault: Fault, times: int = 1_000_000) -> None:
        """The next `times` requests meet this fault."""
        self._ask("POST", f"{FAULT_PATH}{fault}/{times}")

    def counts(self) -> Counter[str]:
        """Requests since the start by method (LIST apart from GET), and `put_bytes`."""
        return Counter(json.loads(self._ask("GET", COUNTS_PATH)))

    def _ask(self, method: str, path: str) -> bytes:
        request = urllib.request.Request(self.endpoint + path, method=method)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.read()


@contextlib.contextmanager
def s3_server() -> Generator[S3Server]:
    """Credentials are in the environment meanwhile."""
    from .redis_server import DIE_WITH_PARENT  # the child runs this file on its own

    command = [sys.executable, "-S", "-c", DIE_WITH_PARENT, sys.executable, __file__]
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        stack.callback(process.kill)
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_REGION", "us-east-1"),
        ):
            stack.enter_context(_environment(name, value))
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError("the S3 server did not start")
        yield S3Server(f"http://127.0.0.1:{port}", process.pid)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Generator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Faulty:
    """A WSGI application in front of moto's."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._changing = threading.Lock()
        self._fault, self._left = "none", 0
        self._counts = Counter[str]()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(FAULT_PATH):
            self._fault, times = path.removeprefix(FAULT_PATH).split("/")
            self._left = int(times)
            return self._answer(start_response, "200 OK")
        if path == COUNTS_PATH:
            return self._answer(start_response, "200 OK", json.dumps(self._counts).encode())
        self._count(environ)
        fault = self._next_fault()
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        if fault == "refuse":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            return self._answer(start_response, "503 Slow Down")
        if fault == "overwrite":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if fault == "unlisted" and "list-type" in environ["QUERY_STRING"]:
            environ["QUERY_STRING"] += "&start-after=zzz"
        if fault == "lose":
            list(self._real(environ, lambda *_: lambda _: None))
            return self._answer(start_response, "503 Slow Down")
        return self._real(environ, start_response)

    def _count(self, environ: dict[str, Any]) -> None:
        method = "LIST" if "list-type" in environ["QUERY_STRING"] else environ["REQUEST_METHOD"]
        self._counts[method] += 1
        if method == "PUT":
            self._counts["put_bytes"] += int(environ.get("CONTENT_LENGTH") or 0)

    def _next_fault(self) -> str:
        self._left -= 1
        return self._fault if self._left >= 0 else "none"

    def _real(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") or "list-type" in environ["QUERY_STRING"]:
            with self._changing:
                return list(self._app(environ, start_response))
        return self._app(environ, start_response)

    @staticmethod
    def _answer(start_response: Callable[..., Any], status: str, body: bytes = b"") -> list[bytes]:
        start_response(status, [("Content-Length", str(len(body)))])
        return [body]


def _serve(port: str = "0", *buckets: str) -> None:
    import logging

    from moto.core.models import DEFAULT_ACCOUNT_ID
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.s3.models import s3_backends
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # or every request would take a connection of its own
    for bucket in buckets:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, CREDENTIALS["AWS_REGION"])
    server = make_server("127.0.0.1", int(port), Faulty(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
