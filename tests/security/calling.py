"""One RPC by its name, and what came of it."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf.message_factory import GetMessageClass

from kvstore_client import GrpcTransport, KVStoreError
from kvstore_client.errors import from_status
from kvstore_client.rpcs import Rpc
from kvstore_server.rpc.handlers import SERVICE

SECONDS = 20.0
METHODS: dict[str, Any] = {method.name: method for method in SERVICE.methods}


@dataclass(frozen=True)
class Answer:
    """`responses` are the bytes of an OK; the rest is of an error."""

    code: str
    text: str = ""
    reason: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    responses: tuple[bytes, ...] = ()


async def ask(transport: GrpcTransport, method: str, requests: list[Any]) -> Answer:
    """Sends every message of the call, also those of a stream, and reads all answers."""
    described = METHODS[method]
    rpc: Rpc[Any, Any] = Rpc(method, _bytes_of, GetMessageClass(described.output_type).FromString)
    try:
        if described.client_streaming and described.server_streaming:
            replies = transport.duplex(rpc, _each(requests))
        elif described.client_streaming:
            return _answered([await transport.upload(rpc, requests, timeout=SECONDS)])
        else:
            replies = transport.download(rpc, requests[0], timeout=SECONDS)
        async with aclosing(replies):
            return _answered([reply async for reply in replies])
    except KVStoreError as error:
        return _refused(error)


def _answered(replies: list[Any]) -> Answer:
    for reply in replies:
        if (status := getattr(reply, "error", None)) is not None and status.code:
            return _refused(from_status(status))
    return Answer("OK", responses=tuple(reply.SerializeToString() for reply in replies))


def _refused(error: KVStoreError) -> Answer:
    return Answer(error.code, str(error.args[0]), error.reason, tuple(sorted(error.facts.items())))


def _bytes_of(message: Any) -> bytes:
    return message.SerializeToString()


async def _each(messages: list[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message
