"""The seam to gRPC: the only module of the client that imports it."""

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from grpc import aio

from kvstore_client.access import OPEN, Access, Tls
from kvstore_client.errors import CLOSED, Cancelled, KVStoreError, Unavailable, from_status
from kvstore_client.rpcs import Rpc
from kvstore_client.tracing import trace_headers

Request = TypeVar("Request")
Reply = TypeVar("Reply")

AFFINITY_KEY = "x-kv-affinity"
STATUS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""What a proxy may say in place of RetryInfo."""
SEND_FAILED = "Internal error from Core"
"""What grpc.aio says, as INTERNAL, when a message could not be sent: the connection was just lost, say."""
STREAM_RESET = "RST_STREAM"
"""What it says, as INTERNAL, when a proxy resets a call because the server behind it is gone."""


class Transport(Protocol):
    """Carries calls to one service. Raises KVStoreError and nothing else for a call that fails.

    `timeout` is in seconds; `affinity`, if not empty, lets a proxy keep one session's calls on one replica.
    """

    async def unary(
        self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = ""
    ) -> Reply: ...

    async def upload(
        self, rpc: Rpc[Request, Reply], requests: Iterable[Request], *, timeout: float, affinity: str = ""
    ) -> Reply: ...

    def download(
        self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = ""
    ) -> AsyncGenerator[Reply]: ...

    def duplex(
        self, rpc: Rpc[Request, Reply], requests: AsyncIterator[Request], *, affinity: str = ""
    ) -> AsyncGenerator[Reply]:
        """No deadline: the caller bounds each request on its own."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class ChannelOptions:
    """How the connection is kept."""

    message_bytes_max: int = 17 << 20
    """The service's 16 MiB with room for what frames it."""
    keepalive_seconds: float = 30.0
    """Idle time after which the connection is probed."""
    keepalive_timeout_seconds: float = 10.0
    """A probe without an answer for so long: the connection is gone."""
    reconnect_seconds_max: float = 2.0
    """Longest pause between attempts to connect; gRPC's own two minutes would outlast every deadline."""

    def arguments(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.max_send_message_length", self.message_bytes_max),
            ("grpc.max_receive_message_length", self.message_bytes_max),
            ("grpc.keepalive_time_ms", int(self.keepalive_seconds * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            # What really bounds the wait for a ping's answer: a minute by default, whatever the timeout above is.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_seconds * 1000)),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", int(self.reconnect_seconds_max * 1000)),
            ("grpc.primary_user_agent", f"remote-kv-store-python/{_version()}"),
            ("grpc.enable_retries", 0),
            # As the server has it: what comes meanwhile is kept, two messages of a Fetch. With the size that gRPC finds
            # by itself they wait for one another.
            ("grpc.http2.lookahead_bytes", 4 << 20),
            ("grpc.http2.bdp_probe", 0),
        ]


class GrpcTransport:
    """Transport over one grpc.aio channel to `target` (`host:port`, `unix:path`, `dns:///name:port`)."""

    def __init__(self, target: str, options: ChannelOptions = ChannelOptions(), access: Access = OPEN) -> None:
        self._target = target
        self._options = options
        self._access = access
        self._channel: aio.Channel | None = None
        self._closed = False

    def _open(self) -> aio.Channel:
        if self._closed:
            raise Cancelled("the client is closed", reason=CLOSED)
        # Not in the constructor: a channel belongs to the event loop that runs when it is made.
        if self._channel is None:
            self._channel = _channel(self._target, self._options.arguments(), self._access.tls)
        return self._channel

    def _metadata(self, affinity: str) -> tuple[tuple[str, str], ...]:
        own = ((AFFINITY_KEY, affinity),) if affinity else ()
        return (*self._access.metadata, *own, *trace_headers())

    async def unary(self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = "") -> Reply:
        method = self._open().unary_unary(rpc.path, rpc.encode, rpc.decode)
        try:
            return await method(request, timeout=timeout, metadata=self._metadata(affinity))
        except aio.AioRpcError as error:
            raise _as_error(error) from None

    async def upload(
        self, rpc: Rpc[Request, Reply], requests: Iterable[Request], *, timeout: float, affinity: str = ""
    ) -> Reply:
        method = self._open().stream_unary(rpc.path, rpc.encode, rpc.decode)
        call = method(iter(requests), timeout=timeout, metadata=self._metadata(affinity))
        first = _FirstStatus(call)
        try:
            return await call
        except aio.AioRpcError as error:
            raise first.error_or(error) from None

    async def download(
        self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = ""
    ) -> AsyncGenerator[Reply]:
        method = self._open().unary_stream(rpc.path, rpc.encode, rpc.decode)
        call = method(request, timeout=timeout, metadata=self._metadata(affinity))
        try:
            async for reply in call:
                yield reply
        except aio.AioRpcError as error:
            raise _as_error(error) from None
        finally:
            call.cancel()

    async def duplex(
        self, rpc: Rpc[Request, Reply], requests: AsyncIterator[Request], *, affinity: str = ""
    ) -> AsyncGenerator[Reply]:
        method = self._open().stream_stream(rpc.path, rpc.encode, rpc.decode)
        call = method(requests, metadata=self._metadata(affinity))
        first = _FirstStatus(call)
        try:
            async for reply in call:
                yield reply
        except aio.AioRpcError as error:
            raise first.error_or(error) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()


def _channel(target: str, options: list[tuple[str, Any]], tls: Tls | None) -> aio.Channel:
    """OSError if a file cannot be read."""
    if tls is None:
        return aio.insecure_channel(target, options=options)
    ca, key, chain = (
        None if file is None else Path(file).read_bytes() for file in (tls.ca_file, tls.key_file, tls.certificate_file)
    )
    name = [("grpc.ssl_target_name_override", tls.server_name)] if tls.server_name else []
    return aio.secure_channel(target, grpc.ssl_channel_credentials(ca, key, chain), options=[*options, *name])


class _FirstStatus:
    """What the server said, when it ends a call while a message is being sent.

    grpc.aio then puts an INTERNAL of its own before or over the server's status (github.com/grpc/grpc/issues/36066).
    """

    def __init__(self, call: aio.Call) -> None:
        self._error: KVStoreError | None = None
        call.add_done_callback(self._keep)

    def error_or(self, last: aio.AioRpcError) -> KVStoreError:
        """The server's status, whichever came first. If it never came, the outcome is unknown: Unavailable."""
        if last.details() != SEND_FAILED:
            return _as_error(last)
        return self._error or Unavailable("the call ended while a message was being sent", reason="STREAM_LOST")

    def _keep(self, call: aio.Call) -> None:
        code, details, trailers = _ready(call.code()), _ready(call.details()), _ready(call.trailing_metadata())
        if code is not grpc.StatusCode.OK and details != SEND_FAILED:
            self._error = _error_of(code, details, trailers)


def _ready(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for: those of a call that is done."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the call is not done")


def _as_error(error: aio.AioRpcError) -> KVStoreError:
    return _error_of(error.code(), error.details(), error.trailing_metadata())


def _error_of(code: grpc.StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]]) -> KVStoreError:
    if code is grpc.StatusCode.INTERNAL and (STREAM_RESET in (details or "") or details == SEND_FAILED):
        return Unavailable(f"the connection was lost ({details})", reason="STREAM_LOST")
    status, pushback_seconds = Status(code=code.value[0], message=details or ""), None
    for key, value in trailers or ():
        if key == STATUS_KEY and isinstance(value, bytes):
            try:
                rich = Status.FromString(value)
            except DecodeError:
                continue
            if rich.code == status.code:
                status = rich
        elif key == PUSHBACK_KEY and isinstance(value, str) and value.isdecimal():
            pushback_seconds = int(value) / 1000
    error = from_status(status)
    if error.retry_after_seconds is None:
        error.retry_after_seconds = pushback_seconds
    return error


def _version() -> str:
    try:
        return version("remote-kv-store")
    except PackageNotFoundError:
        return "0"
