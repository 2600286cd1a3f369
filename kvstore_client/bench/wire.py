"""Bare gRPC: an echo server, and streams driven without the client library, so that like is compared with like."""

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import grpc
from grpc import aio

from kvstore_proto.v1 import kvstore_pb2 as pb

ECHO, UPLOAD = "/bench/Echo", "/bench/Upload"
ATTEND = "/kvstore_proto.v1.KVStoreService/Attend"
MESSAGE_BYTES_MAX = 17 << 20
OPTIONS = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.max_send_message_length", MESSAGE_BYTES_MAX)]
START_SECONDS = 60.0


class Bytes(grpc.GenericRpcHandler):
    """Messages are bytes, here and on the wire."""

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method == ECHO:
            return grpc.stream_stream_rpc_method_handler(_echo)
        if handler_call_details.method == UPLOAD:
            return grpc.stream_unary_rpc_method_handler(_count)
        return None


async def _echo(requests: AsyncIterator[bytes], _: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def _count(requests: AsyncIterator[bytes], _: Any) -> bytes:
    total = 0
    async for request in requests:
        total += len(request)
    return total.to_bytes(8, "little")


def _serve(port: Any) -> None:
    async def run() -> None:
        server = aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((Bytes(),))
        port.value = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())


@contextmanager
def echo_server() -> Iterator[str]:
    """The target of an echo server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    process = context.Process(target=_serve, args=(port,), daemon=True)
    process.start()
    try:
        begun = perf_counter()
        while not port.value:
            if perf_counter() - begun > START_SECONDS or not process.is_alive():
                raise TimeoutError(f"the echo server did not start within {START_SECONDS:g} s")
            process.join(0.05)
        yield f"127.0.0.1:{port.value}"
    finally:
        process.terminate()
        process.join(5)


async def upload_seconds(target: str, message: bytes, count: int) -> float:
    """Of sending `message` so many times in one stream."""

    async def messages() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield message

    async with aio.insecure_channel(target, options=OPTIONS) as channel:
        call = channel.stream_unary(UPLOAD)
        await call(messages())
        begun = perf_counter()
        await call(messages())
        return perf_counter() - begun


class EchoStream:
    """Asks with bytes and gets them back."""

    def __init__(self, channel: aio.Channel, message: bytes) -> None:
        self._call, self._message = channel.stream_stream(ECHO)(), message

    async def ask(self) -> None:
        await self._call.write(self._message)
        await self._call.read()

    async def close(self) -> None:
        await self._call.done_writing()


class AttendCall:
    """One Attend stream with one step in flight: the step's bytes are made once, as an engine's would be."""

    def __init__(self, channel: aio.Channel, session: str, end: int, q: pb.Tensor, layer: int = 0) -> None:
        self._call = channel.stream_stream(ATTEND)()
        self._bind = pb.AttendRequest(bind=pb.AttendBind(handle=1, session=session)).SerializeToString()
        item = pb.AttendStep.Item(handle=1, end=end, rows=q.shape[0])
        step = pb.AttendStep(request_id=1, timeout_ms=30_000, layer=layer, items=[item], q=q)
        self._step = pb.AttendRequest(step=step).SerializeToString()

    async def open(self) -> None:
        await self._exchange(self._bind)
        await self.ask()

    async def ask(self) -> pb.AttendResult:
        return await self._exchange(self._step)

    async def close(self) -> None:
        await self._call.done_writing()

    async def _exchange(self, message: bytes) -> pb.AttendResult:
        await self._call.write(message)
        received: Any = await self._call.read()
        answer = pb.AttendResponse.FromString(received)
        if answer.HasField("error"):
            raise RuntimeError(answer.error.message)
        return answer.result
