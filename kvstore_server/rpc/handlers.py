"""The service's method table, made from its descriptor: a server that lacks an RPC of the protocol does not start.

Messages are parsed here rather than by gRPC, so that bytes that are no message answer INVALID_ARGUMENT and not UNKNOWN.
To gRPC every method is one that takes a stream: of others it would read the message, however large, before anything
here could refuse the caller.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from time import monotonic
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from kvstore_proto.v1 import kvstore_pb2
from kvstore_server.audit import AuditLog
from kvstore_server.errors import DeadlineExceeded, InvalidArgument, KVStoreError
from kvstore_server.limits import Limits
from kvstore_server.log import TENANT
from kvstore_server.monitoring.traces import traced
from kvstore_server.rpc.admission import POOL_OF, Admission, Place
from kvstore_server.rpc.append_messages import parse_append
from kvstore_server.rpc.authentication import NEEDED, Authenticator, Call, check_role, presented
from kvstore_server.rpc.outbox import Outbox
from kvstore_server.rpc.status import abort, malformed
from kvstore_server.telemetry import Outcome, Telemetry

LOG = logging.getLogger(__name__)
AUDITED = {"CreateSession", "UpdateSession", "DeleteSession", "ForkSession", "PutProjection"}
"""Besides every call that is refused for who makes it."""
TARGET_CHARACTERS_MAX = 128
HANG_UP_SECONDS = 0.5
SERVICE = kvstore_pb2.DESCRIPTOR.services_by_name["KVStoreService"]
PARSERS: dict[str, Callable[[bytes], Any]] = {"Append": parse_append, "Attend": bytes}
"""Of messages that protobuf would parse too slowly, and of those that are parsed where they are known."""


class SlowReader(DeadlineExceeded):
    """The client has not taken a message in time."""

    def __init__(self, seconds: float, nothing: Message) -> None:
        text = f"a message waited {seconds} s for the client to read"
        super().__init__("SLOW_READER", text, bound="write_seconds_max", limit=seconds)
        self.nothing = nothing
        """An empty message of the method."""


class Malformed:
    """Stands for bytes that are not the expected message."""


class Handlers:
    """Makes one handler a method; each admits, bounds, counts, and turns what is raised into its status."""

    def __init__(
        self,
        servicer: object,
        authenticator: Authenticator,
        admission: Admission,
        telemetry: Telemetry,
        audit: AuditLog,
        limits: Limits,
    ) -> None:
        self._servicer, self._authenticator, self._admission = servicer, authenticator, admission
        self._telemetry, self._audit, self._limits = telemetry, audit, limits

    def generic(self) -> grpc.GenericRpcHandler:
        """Handlers for every method; AttributeError if the servicer lacks one, KeyError if NEEDED does."""
        methods = {method.name: self._handler(method) for method in SERVICE.methods if NEEDED[method.name]}
        return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        run = getattr(self._servicer, method.name)
        parser = PARSERS.get(method.name, GetMessageClass(method.input_type).FromString)

        def parse(data: bytes) -> Any:
            try:
                return parser(data)
            except DecodeError:
                return Malformed()

        async def request_of(requests: AsyncIterator[Any], call: "CallInProgress") -> Any:
            if method.client_streaming:
                return call.checked(requests, self._limits.read_seconds_max)
            return await call.only(requests, counted=POOL_OF.get(method.name) == "queries")

        async def single(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            async with self._guarded(method.name, context) as call:
                response = await run(await request_of(requests, call), call.facts)
                call.target = call.target or getattr(response, "sha256", "")
                return response

        async def stream(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            async with self._guarded(method.name, context) as call:
                responses = run(await request_of(requests, call), call.facts)
                await self._write(context, call, responses, GetMessageClass(method.output_type))

        async def duplex(_: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            seconds, nothing = self._limits.write_seconds_max, GetMessageClass(method.output_type)
            async with self._guarded(method.name, context) as call:
                outbox = Outbox(context.write, call.check, seconds, lambda: SlowReader(seconds, nothing()))
                await run(partial(call.next, context), call.facts, outbox)

        make = (
            grpc.stream_stream_rpc_method_handler if method.server_streaming else grpc.stream_unary_rpc_method_handler
        )
        handle = single if not method.server_streaming else duplex if method.client_streaming else stream
        return make(
            handle,
            request_deserializer=parse,
            response_serializer=_serialized,
        )

    @asynccontextmanager
    async def _guarded(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator["CallInProgress"]:
        call: CallInProgress | None = None
        with self._telemetry.call(method) as outcome, traced(method, context.invocation_metadata()):
            try:
                seconds = deadline_seconds(context, self._limits)
                caller = self._authenticator.caller_of(context)
                outcome.tenant = caller.tenant
                TENANT.set(caller.tenant)
                call = CallInProgress(self._authenticator, Call(caller, monotonic() + seconds), self._limits)
                check_role(caller, method)
                with self._admission.call(method, caller.tenant, call.facts.deadline) as call.place:
                    try:
                        # An Attend stream lives on; its steps have deadlines of their own.
                        async with asyncio.timeout(None if method == "Attend" else seconds):
                            yield call
                    except SlowReader as error:
                        await self._hang_up(context, error)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                outcome.code = "CANCELLED"
                raise
            except TimeoutError:
                outcome.code = "DEADLINE_EXCEEDED"
                await abort(context, DeadlineExceeded("DEADLINE", "the call took longer than its deadline"))
            except Exception as error:
                outcome.code = error.code if isinstance(error, KVStoreError) else "INTERNAL"
                outcome.reason = error.reason if isinstance(error, KVStoreError) else ""
                LOG.debug("%s answers %s: %s", method, outcome.code, error)
                await abort(context, error)
            finally:
                if method in AUDITED or outcome.code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
                    self._note(method, context, call, outcome)

    def _note(
        self, method: str, context: grpc.aio.ServicerContext, call: "CallInProgress | None", outcome: Outcome
    ) -> None:
        who = presented(context) if call is None else call.facts.caller.name
        target = "" if call is None else call.target
        peer = context.peer() or ""
        self._audit.record(who=who, tenant=outcome.tenant, what=method, target=target, result=outcome.code, peer=peer)

    async def _write(
        self,
        context: grpc.aio.ServicerContext,
        call: "CallInProgress",
        responses: AsyncGenerator[Message],
        nothing: Callable[[], Message],
    ) -> None:
        """A client that does not read must not hold its place for ever."""
        seconds, now = self._limits.write_seconds_max, asyncio.get_running_loop().time
        limit = asyncio.timeout(None)
        try:
            async with limit, aclosing(responses):
                async for response in responses:
                    call.check()
                    limit.reschedule(now() + seconds)
                    await context.write(response)
                    limit.reschedule(None)
        except TimeoutError:
            if not limit.expired():
                raise
            raise SlowReader(seconds, nothing()) from None

    async def _hang_up(self, context: grpc.aio.ServicerContext, error: SlowReader) -> None:
        """Ends the call once the client has taken the message that is under way, or is gone: gRPC cannot take it back.

        So whoever does not read fills up the places of its own tenant, and not the memory. A server that stops does not
        wait for it.
        """
        while not self._admission.draining.is_set():
            try:
                async with asyncio.timeout(HANG_UP_SECONDS):
                    await context.write(error.nothing)  # refused at once while there is another
            except grpc.aio.AbortError:
                raise
            except Exception:
                await asyncio.sleep(HANG_UP_SECONDS)
            else:
                await abort(context, error)
        raise asyncio.CancelledError


class CallInProgress:
    """A call of a known caller, who must stay known: each message of a stream is let through only then."""

    place: Place

    def __init__(self, authenticator: Authenticator, facts: Call, limits: Limits) -> None:
        self._authenticator, self.facts, self._limits = authenticator, facts, limits
        self.target = ""
        """What the call is about, for the audit log."""

    def check(self) -> None:
        self._authenticator.check(self.facts.caller)

    async def only(self, requests: AsyncIterator[Any], *, counted: bool) -> Any:
        """The one message of a method that takes no stream; its bytes are held for as long as the call if `counted`."""
        request = await self._next(aiter(requests), self._limits.read_seconds_max)
        if request is None:
            raise InvalidArgument("message", "there is none")
        self.target = _target(_well_formed(request))
        if counted:
            self.place.grow(request.ByteSize())
        return request

    async def next(self, context: grpc.aio.ServicerContext) -> Any:
        """The next message, which may take as long as it likes to come; None at the end."""
        request = await context.read()
        if request is grpc.aio.EOF:
            return None
        self.check()
        return _well_formed(request)

    async def checked(self, requests: AsyncIterator[Any], seconds: float) -> AsyncIterator[Any]:
        """Each message, which may take so long to come."""
        incoming = aiter(requests)
        while (request := await self._next(incoming, seconds)) is not None:
            self.check()
            yield _well_formed(request)

    @staticmethod
    async def _next(incoming: AsyncIterator[Any], seconds: float) -> Any:
        """None at the end."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await anext(incoming, None)
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"the next message did not come within {seconds:g} s"
            raise DeadlineExceeded("SLOW_WRITER", text, bound="read_seconds_max", limit=seconds) from None


def deadline_seconds(context: grpc.aio.ServicerContext, limits: Limits) -> float:
    """What is left for a call: the caller's deadline, the default where there is none, never beyond the longest."""
    remaining = context.time_remaining()
    return min(limits.deadline_default_seconds if remaining is None else remaining, limits.deadline_seconds_max)


def _target(request: Any) -> str:
    """The session that a request names; of a fork source and name."""
    names = [getattr(request, field, "") for field in ("source", "name")]
    return " -> ".join(name[:TARGET_CHARACTERS_MAX] for name in names if name)


def _serialized(response: Message | bytes) -> bytes:
    return response if isinstance(response, bytes) else response.SerializeToString()


def _well_formed(request: Any) -> Any:
    if isinstance(request, Malformed):
        raise malformed()
    return request
