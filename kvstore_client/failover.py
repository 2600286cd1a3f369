"""Several replicas of one store as one transport: a call goes to one that answers, the next attempt to another."""

import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from kvstore_client.access import Tls, access_to
from kvstore_client.errors import Cancelled, DeadlineExceeded, Unavailable
from kvstore_client.retry import SYSTEM_CLOCK, Clock
from kvstore_client.rpcs import Rpc
from kvstore_client.transport import ChannelOptions, GrpcTransport, Transport

Request = TypeVar("Request")
Reply = TypeVar("Reply")

REST_SECONDS, REST_SECONDS_MAX = 1.0, 30.0
"""For how long a replica that failed is left alone; doubled with each failure in a row."""
ATTEMPT_SHARE = 0.5
"""Of the time that is left, for one attempt: a replica that says nothing must leave time to ask another."""
OPTIONS = ChannelOptions(keepalive_seconds=10.0, keepalive_timeout_seconds=5.0)
"""An Attend stream has no deadline: a replica that vanished is noticed within the default deadline of a step."""


def open_transport(target: str | Sequence[str], api_key: str | None = None, tls: Tls | bool | None = None) -> Transport:
    """To one server, or to any of several replicas. ValueError as access_to has it."""
    if isinstance(target, str):
        return GrpcTransport(target, access=access_to(target, api_key, tls))
    return FailoverTransport({each: GrpcTransport(each, OPTIONS, access_to(each, api_key, tls)) for each in target})


@dataclass
class Replica:
    name: str
    transport: Transport
    failures: int = 0
    rests_until: float = 0.0

    def preference(self, affinity: str) -> bytes:
        """The same for every client, so that all find one session's rows at the same replica."""
        return blake2b(f"{affinity} {self.name}".encode(), digest_size=8).digest()


class FailoverTransport:
    """Transport over replicas of equal standing: any of them is right for any call.

    A call goes to the replica that its affinity prefers, unless that one failed lately. It is not repeated here: the
    caller's retries are what reaches the next replica.
    """

    def __init__(self, replicas: dict[str, Transport], clock: Clock = SYSTEM_CLOCK) -> None:
        if not replicas:
            raise ValueError("target names no server")
        self._replicas = [Replica(name, transport) for name, transport in replicas.items()]
        self._clock = clock
        self._own_affinity = secrets.token_hex(8)
        """For calls of no session: clients spread over the replicas."""

    async def unary(self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = "") -> Reply:
        with self._chosen(affinity) as transport:
            return await transport.unary(rpc, request, timeout=self._share(timeout), affinity=affinity)

    async def upload(
        self, rpc: Rpc[Request, Reply], requests: Iterable[Request], *, timeout: float, affinity: str = ""
    ) -> Reply:
        with self._chosen(affinity) as transport:
            return await transport.upload(rpc, requests, timeout=self._share(timeout), affinity=affinity)

    async def download(
        self, rpc: Rpc[Request, Reply], request: Request, *, timeout: float, affinity: str = ""
    ) -> AsyncGenerator[Reply]:
        with self._chosen(affinity) as transport:
            call = transport.download(rpc, request, timeout=self._share(timeout), affinity=affinity)
            async with aclosing(call) as replies:
                async for reply in replies:
                    yield reply

    async def duplex(
        self, rpc: Rpc[Request, Reply], requests: AsyncIterator[Request], *, affinity: str = ""
    ) -> AsyncGenerator[Reply]:
        with self._chosen(affinity) as transport:
            async with aclosing(transport.duplex(rpc, requests, affinity=affinity)) as replies:
                async for reply in replies:
                    yield reply

    async def close(self) -> None:
        for replica in self._replicas:
            await replica.transport.close()

    def _share(self, timeout: float) -> float:
        return timeout * ATTEMPT_SHARE if len(self._replicas) > 1 else timeout

    @contextmanager
    def _chosen(self, affinity: str) -> Iterator[Transport]:
        now = self._clock.now()
        order = sorted(self._replicas, key=lambda each: each.preference(affinity or self._own_affinity))
        replica = next((each for each in order if each.rests_until <= now), None)
        replica = replica or min(order, key=lambda each: each.rests_until)
        try:
            yield replica.transport
        except (Cancelled, DeadlineExceeded, Unavailable):
            rest = min(REST_SECONDS * 2**replica.failures, REST_SECONDS_MAX)
            replica.failures += 1
            replica.rests_until = self._clock.now() + rest
            raise
        replica.failures, replica.rests_until = 0, 0.0
