"""What a client shares with its session handles: transport, retry policy, the server's limits, attend streams."""

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from kvstore_client.attend import AttendStream
from kvstore_client.info import ServerInfo, server_from
from kvstore_client.retry import SYSTEM_CLOCK, Clock, Retry
from kvstore_client.rpcs import GET_SERVER_INFO, Rpc
from kvstore_client.transport import Transport
from kvstore_proto.v1 import kvstore_pb2 as pb

Request = TypeVar("Request")
Reply = TypeVar("Reply")
T = TypeVar("T")

TIMEOUT_SECONDS = 30.0
"""Default deadline of a call, retries included."""


class Link:
    def __init__(self, transport: Transport, retry: Retry, clock: Clock = SYSTEM_CLOCK) -> None:
        self.transport, self.retry, self.clock = transport, retry, clock
        self._server: ServerInfo | None = None
        self._streams: dict[str, AttendStream] = {}

    async def unary(self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = "") -> Reply:
        return await self.retry.run(
            lambda seconds: self.transport.unary(rpc, request, timeout=seconds, affinity=affinity),
            timeout=timeout,
            clock=self.clock,
        )

    async def upload(
        self, rpc: Rpc[Request, Reply], requests: Callable[[], Iterable[Request]], *, timeout: float, affinity: str = ""
    ) -> Reply:
        """`requests` is called for each attempt."""
        return await self.retry.run(
            lambda seconds: self.transport.upload(rpc, requests(), timeout=seconds, affinity=affinity),
            timeout=timeout,
            clock=self.clock,
        )

    async def download(
        self,
        rpc: Rpc[Request, Reply],
        request: Request,
        collect: Callable[[AsyncIterable[Reply]], Awaitable[T]],
        *,
        timeout: float,
        affinity: str = "",
    ) -> T:
        """What `collect` makes of the replies of one whole, unbroken stream."""

        async def attempt(seconds: float) -> T:
            async with aclosing(self.transport.download(rpc, request, timeout=seconds, affinity=affinity)) as replies:
                return await collect(replies)

        return await self.retry.run(attempt, timeout=timeout, clock=self.clock)

    async def server(self, timeout: float = TIMEOUT_SECONDS) -> ServerInfo:
        """As it was at the first call: limits do not change while a server runs."""
        if self._server is None:
            reply = await self.unary(GET_SERVER_INFO, pb.GetServerInfoRequest(), timeout=timeout)
            self._server = server_from(reply)
        return self._server

    def attend_stream(self, affinity: str) -> AttendStream:
        """One stream serves all sessions of one affinity, so that a proxy can keep them where their pages are."""
        if affinity not in self._streams:
            self._streams[affinity] = AttendStream(self.transport, self.retry, self.clock, affinity)
        return self._streams[affinity]

    async def close(self) -> None:
        for stream in self._streams.values():
            await stream.close()
        await self.transport.close()
