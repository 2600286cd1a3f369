"""A real gRPC server in the test's own event loop that answers what the test says and remembers what it was asked."""

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import aio

from kvstore_proto.v1 import kvstore_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["KVStoreService"]


@dataclass
class Call:
    """One call as it came: all its requests, its metadata and the seconds it had."""

    name: str
    requests: list[Any]
    metadata: dict[str, str]
    seconds: float | None

    @property
    def request(self) -> Any:
        (only,) = self.requests
        return only


@dataclass
class Failure(Exception):
    """A status with details."""

    code: str
    text: str = "no"
    reason: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    retry_after_seconds: float | None = None

    def status(self) -> Status:
        status = Status(code=Code.Value(self.code), message=self.text)
        if self.reason or self.facts:
            status.details.add().Pack(ErrorInfo(reason=self.reason, domain="kvstore", metadata=self.facts))
        if self.retry_after_seconds is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after_seconds * 1e9))
            status.details.add().Pack(RetryInfo(retry_delay=delay))
        return status


@dataclass
class AtFirstMessage:
    """Fails a client stream as soon as its first message has come."""

    failure: Failure


Duplex = Callable[[AsyncIterator[Any], aio.ServicerContext], AsyncIterator[Any]]
Answer = Message | Failure | AtFirstMessage | Sequence[Message | Failure] | Callable[[Call], Awaitable[Any]] | Duplex


class ScriptedServer:
    """`will` queues answers, one a call; `always` answers whenever nothing is queued. Anything else fails the test."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.target = ""
        self._queued: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self._always: dict[str, Answer] = {}
        self._unexpected: list[str] = []
        self._server: aio.Server | None = None
        self._port = 0

    def will(self, name: str, *answers: Answer) -> None:
        self._queued[name].extend(answers)

    def always(self, name: str, answer: Answer) -> None:
        self._always[name] = answer

    def of(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]

    def check_consumed(self) -> None:
        left = {name: len(answers) for name, answers in self._queued.items() if answers}
        assert not left, f"answers nobody asked for: {left}"
        assert not self._unexpected, f"calls without an answer: {self._unexpected}"

    async def start(self) -> None:
        self._server = aio.server(options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 16 << 20)])
        handlers = {method.name: self._handler(method) for method in SERVICE.methods}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        self.target = f"127.0.0.1:{self._port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)
        self._server = None

    def _next(self, name: str) -> Answer:
        if self._queued[name]:
            return self._queued[name].popleft()
        if name not in self._always:
            self._unexpected.append(name)
        return self._always.get(name, Failure("UNIMPLEMENTED", "not in the script"))

    def _handler(self, method: Any) -> grpc.RpcMethodHandler:
        async def answers(requests: Any, context: aio.ServicerContext) -> AsyncIterator[Any]:
            metadata = {key: str(value) for key, value in context.invocation_metadata() or ()}
            call = Call(method.name, [], metadata, context.time_remaining())
            self.calls.append(call)
            answer = self._next(method.name)
            if method.name == "Attend" and callable(answer):
                async for message in answer(_recorded(requests, call), context):  # type: ignore[arg-type]
                    yield message
                return
            if isinstance(answer, AtFirstMessage):
                await anext(requests)
                await fail(context, answer.failure)
            if method.client_streaming:
                async for _ in _recorded(requests, call):
                    pass
            else:
                call.requests.append(requests)
            try:
                if callable(answer):
                    answer = await answer(call)  # type: ignore[call-arg]
                for message in answer if isinstance(answer, Sequence) else [answer]:
                    if isinstance(message, Failure):
                        raise message
                    yield message
            except Failure as failure:
                await fail(context, failure)

        async def one(requests: Any, context: aio.ServicerContext) -> Any:
            return await anext(answers(requests, context))

        kinds = ("stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming))
        return getattr(grpc, f"{'_'.join(kinds)}_rpc_method_handler")(
            answers if method.server_streaming else one,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )


async def fail(context: aio.ServicerContext, failure: Failure) -> None:
    code = next(code for code in grpc.StatusCode if code.name == failure.code)
    await context.abort(code, failure.text, (("grpc-status-details-bin", failure.status().SerializeToString()),))


async def _recorded(requests: AsyncIterator[Any], call: Call) -> AsyncIterator[Any]:
    async for request in requests:
        call.requests.append(request)
        yield request


@asynccontextmanager
async def scripted_server() -> AsyncGenerator[ScriptedServer]:
    server = ScriptedServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
    server.check_consumed()
