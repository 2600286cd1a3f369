"""The asynchronous client: sessions by name, and the server itself."""

from collections.abc import Iterator, Sequence
from typing import Self

from kvstore_client.access import Tls
from kvstore_client.failover import open_transport
from kvstore_client.fetching import fetch_projection
from kvstore_client.info import (
    PrefixMatch,
    ProjectionInfo,
    ServerInfo,
    SessionInfo,
    server_from,
    session_from,
    shape_to,
)
from kvstore_client.link import TIMEOUT_SECONDS, Link
from kvstore_client.retry import DEFAULT_RETRY, Retry
from kvstore_client.rpcs import (
    CREATE_SESSION,
    DELETE_SESSION,
    GET_SERVER_INFO,
    GET_SESSION,
    LIST_PROJECTIONS,
    LIST_SESSIONS,
    MATCH_PREFIX,
    PUT_PROJECTION,
)
from kvstore_client.session import Session
from kvstore_client.token_chain import TokenChain
from kvstore_client.transport import Transport
from kvstore_codecs.spec import CodecSpec, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb

UPLOAD_BYTES = 2 << 20


class AsyncKVStoreClient:
    """A store at `target` (`host:port`, `unix:path`, `dns:///name:port`), or at several: replicas of equal standing.

        async with AsyncKVStoreClient("localhost:7700") as client:
            session = await client.create_session("book", shape)
            await session.append(k, v)
            out, lse = await session.attend(0, q)

    Belongs to the event loop that first uses it. `timeout` of a call is in seconds and covers its retries. Of several
    replicas, one that fails costs a retry at another.

    `api_key` and `tls` (True: with gRPC's own roots) say who calls and how that is encrypted; what is not given comes
    from KVSTORE_API_KEY and KVSTORE_TLS_CA_FILE, KVSTORE_TLS_CERTIFICATE_FILE, ... (kvstore_client/access.py).
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls: Tls | bool | None = None,
        retry: Retry = DEFAULT_RETRY,
        transport: Transport | None = None,
    ) -> None:
        self._link = Link(open_transport(target, api_key, tls) if transport is None else transport, retry)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends open streams and the connection."""
        await self._link.close()

    async def create_session(
        self,
        name: str,
        shape: ModelShape,
        codec: CodecSpec | None = None,
        *,
        ttl_seconds: float | None = None,
        pinned: bool = False,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Session:
        """A new session, or the one of that name if shape and codec are the same; AlreadyExists if they differ.

        None as codec leaves it to the server. Without `ttl_seconds` the session never expires.
        """
        request = pb.CreateSessionRequest(
            name=name,
            shape=shape_to(shape),
            codec_json=None if codec is None else codec.model_dump_json(),
            ttl_seconds=ttl_seconds,
            pinned=pinned,
        )
        reply = await self._link.unary(CREATE_SESSION, request, timeout=timeout)
        return Session(self._link, session_from(reply.session))

    async def open_session(self, name: str, *, timeout: float = TIMEOUT_SECONDS) -> Session:
        """An existing session at its present length; NotFound if there is none."""
        reply = await self._link.unary(GET_SESSION, pb.GetSessionRequest(name=name), timeout=timeout)
        return Session(self._link, session_from(reply.session))

    async def list_sessions(
        self, prefix: str = "", *, limit: int = 1000, timeout: float = TIMEOUT_SECONDS
    ) -> list[SessionInfo]:
        """At most `limit` sessions whose names start with `prefix`; `timeout` is for each page."""
        found: list[SessionInfo] = []
        token = ""
        while len(found) < limit:
            request = pb.ListSessionsRequest(prefix=prefix, page_token=token)
            reply = await self._link.unary(LIST_SESSIONS, request, timeout=timeout)
            found += map(session_from, reply.sessions)
            if not (token := reply.next_page_token):
                break
        return found[:limit]

    async def delete_session(
        self, name: str, *, generation: str | None = None, timeout: float = TIMEOUT_SECONDS
    ) -> bool:
        """False if there was nothing to delete. Forks keep what they share."""
        request = pb.DeleteSessionRequest(name=name, generation=generation)
        return (await self._link.unary(DELETE_SESSION, request, timeout=timeout)).deleted

    async def match_prefix(
        self, model_fingerprint: str, chain: TokenChain, *, timeout: float = TIMEOUT_SECONDS
    ) -> PrefixMatch | None:
        """The longest prefix of a context that a session of this model holds, in whole blocks."""
        request = pb.MatchPrefixRequest(model_fingerprint=model_fingerprint, block_hashes=chain.hashes)
        reply = await self._link.unary(MATCH_PREFIX, request, timeout=timeout)
        if not reply.HasField("session"):
            return None
        return PrefixMatch(reply.session, reply.generation, reply.end, reply.valid_until_unix_seconds)

    async def server_info(self, *, timeout: float = TIMEOUT_SECONDS) -> ServerInfo:
        return server_from(await self._link.unary(GET_SERVER_INFO, pb.GetServerInfoRequest(), timeout=timeout))

    async def put_projection(self, data: bytes, *, timeout: float = TIMEOUT_SECONDS) -> str:
        """Stores a projection artifact; returns its sha256, which names it."""

        def requests() -> Iterator[pb.PutProjectionRequest]:
            for first in range(0, len(data), UPLOAD_BYTES):
                yield pb.PutProjectionRequest(data=data[first : first + UPLOAD_BYTES])

        return (await self._link.upload(PUT_PROJECTION, requests, timeout=timeout)).sha256

    async def get_projection(self, sha256: str, *, timeout: float = TIMEOUT_SECONDS) -> bytes:
        return await fetch_projection(self._link, sha256, timeout)

    async def list_projections(self, *, limit: int = 1000, timeout: float = TIMEOUT_SECONDS) -> list[ProjectionInfo]:
        """At most `limit` of them; `timeout` is for each page."""
        found: list[ProjectionInfo] = []
        token = ""
        while len(found) < limit:
            reply = await self._link.unary(
                LIST_PROJECTIONS, pb.ListProjectionsRequest(page_token=token), timeout=timeout
            )
            found += [
                ProjectionInfo(each.sha256, each.bytes, each.model_fingerprint, each.header_json)
                for each in reply.projections
            ]
            if not (token := reply.next_page_token):
                break
        return found[:limit]
