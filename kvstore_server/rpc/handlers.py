"""The service's method table, made from its descriptor: a server that lacks an RPC of the protocol does not start.

Messages are parsed here rather than by gRPC, so that bytes that are no message answer INVALID_ARGUMENT and not UNKNOWN.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore_proto.v1 import kvstore_pb2
from kvstore_server.errors import InvalidArgument, KVStoreError, Unavailable
from kvstore_server.rpc.status import abort
from kvstore_server.telemetry import Telemetry

SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"]


class Malformed:
    """Stands for bytes that are not the expected message."""


class Admission:
    """Counts calls in flight, so that drain can wait for them, and refuses new ones while draining."""

    def __init__(self) -> None:
        self.draining = asyncio.Event()
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        if self.draining.is_set():
            raise Unavailable("DRAINING", "the server is draining")
        self.in_flight += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def idle(self) -> None:
        """Returns when no call is in flight."""
        await self._idle.wait()


def generic_handler(servicer: object, admission: Admission, telemetry: Telemetry) -> grpc.GenericRpcHandler:
    """Handlers for every method; AttributeError if `servicer` lacks one."""
    methods = {m.name: _handler(getattr(servicer, m.name), m, admission, telemetry) for m in SERVICE.methods}
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


def _handler(
    call: Callable[..., Any], method: Any, admission: Admission, telemetry: Telemetry
) -> grpc.RpcMethodHandler:
    request_class = GetMessageClass(method.input_type)

    def parse(data: bytes) -> Message | Malformed:
        try:
            return request_class.FromString(data)
        except DecodeError:
            return Malformed()

    @asynccontextmanager
    async def guarded(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Admits the call, counts how it ends, and turns whatever is raised into its status."""
        with telemetry.call(method.name) as outcome:
            try:
                with admission:
                    yield
            except (asyncio.CancelledError, grpc.aio.AbortError):
                outcome.code = "CANCELLED"
                raise
            except Exception as error:
                outcome.code = error.code if isinstance(error, KVStoreError) else "INTERNAL"
                await abort(context, error)

    async def single(request: Any, context: grpc.aio.ServicerContext) -> Any:
        async with guarded(context):
            return await call(_checked_input(request, method.client_streaming), context)

    async def stream(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async with guarded(context):
            async for response in call(_checked_input(request, method.client_streaming), context):
                yield response

    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        stream if method.server_streaming else single,
        request_deserializer=parse,
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _checked_input(request: Any, streaming: bool) -> Any:
    return _checked_stream(request) if streaming else _well_formed(request)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _well_formed(request)


def _well_formed(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise InvalidArgument("message", "the bytes are not a message of this method")
    return request
