"""The service's method table, made from its descriptor: a server that lacks an RPC of the protocol does not start.

Messages are parsed here rather than by gRPC, so that bytes that are no message answer INVALID_ARGUMENT and not UNKNOWN.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore_proto.v1 import kvstore_pb2
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, KVStoreError, ResourceExhausted, Unavailable
from kvstore_server.limits import Limits
from kvstore_server.rpc.append_messages import parse_append
from kvstore_server.rpc.status import abort
from kvstore_server.telemetry import Telemetry

BUSY_RETRY_SECONDS = 0.05
SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"]
PARSERS: dict[str, Callable[[bytes], Any]] = {"Append": parse_append}
"""Of messages that protobuf would parse too slowly."""


class Malformed:
    """Stands for bytes that are not the expected message."""


class Admission:
    """Who may come in: nobody while draining, and only so many at a time where `limits` says so."""

    def __init__(self, limits: Limits) -> None:
        self.draining = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_flight: Counter[str] = Counter()
        queries = ("queries_inflight_max", limits.queries_inflight_max)
        projections = ("projections_inflight_max", limits.projections_inflight_max)
        self._bounds = {
            "Score": queries,
            "TopK": queries,
            "Fetch": queries,
            "PutProjection": projections,
            "GetProjection": projections,
            "Attend": ("attend_streams_max", limits.attend_streams_max),
        }

    @property
    def in_flight(self) -> int:
        return self._in_flight.total()

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """Holds a place for one call; Unavailable while draining, ResourceExhausted when there is none."""
        if self.draining.is_set():
            raise Unavailable("DRAINING", "the server is draining")
        name, limit = self._bounds.get(method, ("", 0))
        if name and self._in_flight[name] >= limit:
            raise ResourceExhausted("BUSY", f"{limit} such calls are in flight", BUSY_RETRY_SECONDS, limit=limit)
        self._in_flight[name] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight[name] -= 1
            if not self.in_flight:
                self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()


class Handlers:
    """Makes one handler a method; each admits, bounds, counts, and turns what is raised into its status."""

    def __init__(self, servicer: object, admission: Admission, telemetry: Telemetry, limits: Limits) -> None:
        self._servicer, self._admission, self._telemetry, self._limits = servicer, admission, telemetry, limits

    def generic(self) -> grpc.GenericRpcHandler:
        """Handlers for every method; AttributeError if the servicer lacks one."""
        methods = {method.name: self._handler(method) for method in SERVICE.methods}
        return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        call = getattr(self._servicer, method.name)
        parser = PARSERS.get(method.name, GetMessageClass(method.input_type).FromString)

        def parse(data: bytes) -> Any:
            try:
                return parser(data)
            except DecodeError:
                return Malformed()

        async def single(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._guarded(method.name, context):
                return await call(_checked_input(request, method.client_streaming), context)

        async def stream(request: Any, context: grpc.aio.ServicerContext) -> None:
            async with self._guarded(method.name, context):
                await self._write(context, call(_checked_input(request, method.client_streaming), context))

        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            stream if method.server_streaming else single,
            request_deserializer=parse,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )

    @asynccontextmanager
    async def _guarded(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        with self._telemetry.call(method) as outcome:
            try:
                with self._admission.call(method):
                    # An Attend stream lives on; its steps have deadlines of their own.
                    async with asyncio.timeout(None if method == "Attend" else self._seconds(context)):
                        yield
            except (asyncio.CancelledError, grpc.aio.AbortError):
                outcome.code = "CANCELLED"
                raise
            except TimeoutError:
                outcome.code = "DEADLINE_EXCEEDED"
                await abort(context, DeadlineExceeded("DEADLINE", "the call took longer than its deadline"))
            except Exception as error:
                outcome.code = error.code if isinstance(error, KVStoreError) else "INTERNAL"
                await abort(context, error)

    async def _write(self, context: grpc.aio.ServicerContext, responses: AsyncIterator[Message]) -> None:
        """A client that does not read must not hold its place for ever."""
        seconds, now = self._limits.write_seconds_max, asyncio.get_running_loop().time
        limit = asyncio.timeout(None)
        try:
            async with limit:
                async for response in responses:
                    limit.reschedule(now() + seconds)
                    await context.write(response)
                    limit.reschedule(None)
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"a message waited {seconds} s for the client to read"
            raise DeadlineExceeded("SLOW_READER", text, limit=seconds) from None

    def _seconds(self, context: grpc.aio.ServicerContext) -> float:
        return deadline_seconds(context, self._limits)


def deadline_seconds(context: grpc.aio.ServicerContext, limits: Limits) -> float:
    """What is left for a call: the caller's deadline, the default where there is none, never beyond the longest."""
    remaining = context.time_remaining()
    return min(limits.deadline_default_seconds if remaining is None else remaining, limits.deadline_seconds_max)


def _checked_input(request: Any, streaming: bool) -> Any:
    return _checked_stream(request) if streaming else _well_formed(request)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)


def _well_formed(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise InvalidArgument("message", "the bytes are not a message of this method")
    return request
