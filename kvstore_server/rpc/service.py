"""Every RPC: convert, call, convert. What a session is lives in kvstore_server.sessions."""

import json
from collections.abc import AsyncIterator

from kvstore_codecs.spec import Affine, Matryoshka, Projected, Qjl, Raw, Rotated
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import InvalidArgument
from kvstore_server.rpc import convert
from kvstore_server.rpc.admission import Admission
from kvstore_server.rpc.append_messages import CutFrame
from kvstore_server.rpc.attend_stream import AttendStream, Receive
from kvstore_server.rpc.authentication import Call
from kvstore_server.rpc.fetch_stream import fetch_responses
from kvstore_server.rpc.outbox import Outbox
from kvstore_server.sessions.model import Query
from kvstore_server.sessions.service import SessionService
from kvstore_server.storage.segment_header import VERSION

CODECS = tuple(codec.model_fields["name"].default for codec in (Raw, Qjl, Rotated, Affine, Matryoshka, Projected))


class KVStoreServicer:
    """The service of kvstore.proto: each call sees the sessions of its caller's tenant."""

    def __init__(self, sessions: SessionService, admission: Admission, info: pb.GetServerInfoResponse) -> None:
        self._sessions, self._admission, self._info = sessions, admission, info
        self._limits = sessions.limits

    async def CreateSession(self, request: pb.CreateSessionRequest, call: Call) -> pb.CreateSessionResponse:
        if request.HasField("codec_json") and len(request.codec_json) > self._limits.codec_json_bytes_max:
            limit = self._limits.codec_json_bytes_max
            raise InvalidArgument("codec_json", f"is longer than {limit} bytes", limit=limit)
        info, present = await self._sessions.lifecycle.create(
            call.tenant,
            request.name,
            convert.shape_from(request.shape),
            convert.spec_from(request.codec_json) if request.HasField("codec_json") else None,
            request.ttl_seconds if request.HasField("ttl_seconds") else None,
            request.pinned,
        )
        return pb.CreateSessionResponse(session=convert.session_to(info), already_present=present)

    async def GetSession(self, request: pb.GetSessionRequest, call: Call) -> pb.GetSessionResponse:
        info = await self._sessions.lifecycle.get(call.tenant, request.name)
        return pb.GetSessionResponse(session=convert.session_to(info))

    async def ListSessions(self, request: pb.ListSessionsRequest, call: Call) -> pb.ListSessionsResponse:
        infos, token = await self._sessions.lifecycle.page(
            call.tenant, request.prefix, request.page_size, request.page_token
        )
        return pb.ListSessionsResponse(sessions=map(convert.session_to, infos), next_page_token=token)

    async def UpdateSession(self, request: pb.UpdateSessionRequest, call: Call) -> pb.UpdateSessionResponse:
        ttl = request.ttl_seconds if request.HasField("ttl_seconds") else None
        if request.clear_ttl and ttl is not None:
            raise InvalidArgument("clear_ttl", "excludes ttl_seconds")
        info = await self._sessions.lifecycle.update(
            call.tenant,
            request.name,
            request.generation,
            ttl,
            request.clear_ttl,
            request.pinned if request.HasField("pinned") else None,
        )
        return pb.UpdateSessionResponse(session=convert.session_to(info))

    async def DeleteSession(self, request: pb.DeleteSessionRequest, call: Call) -> pb.DeleteSessionResponse:
        generation = request.generation if request.HasField("generation") else None
        return pb.DeleteSessionResponse(
            deleted=await self._sessions.lifecycle.delete(call.tenant, request.name, generation)
        )

    async def ForkSession(self, request: pb.ForkSessionRequest, call: Call) -> pb.ForkSessionResponse:
        info, present = await self._sessions.lifecycle.fork(
            call.tenant,
            request.source,
            request.source_generation if request.HasField("source_generation") else None,
            request.end if request.HasField("end") else None,
            request.name,
            request.ttl_seconds if request.HasField("ttl_seconds") else None,
            request.pinned,
        )
        return pb.ForkSessionResponse(session=convert.session_to(info), already_present=present)

    async def MatchPrefix(self, request: pb.MatchPrefixRequest, call: Call) -> pb.MatchPrefixResponse:
        found = await self._sessions.prefixes.match(call.tenant, request.model_fingerprint, request.block_hashes)
        if found is None:
            return pb.MatchPrefixResponse()
        return pb.MatchPrefixResponse(
            session=found.session,
            generation=found.generation,
            end=found.end,
            valid_until_unix_seconds=found.valid_until_unix_seconds,
        )

    async def Prefetch(self, request: pb.PrefetchRequest, call: Call) -> pb.PrefetchResponse:
        generation = request.generation if request.HasField("generation") else None
        loaded = await self._sessions.querying.prefetch(
            call.tenant, request.session, generation, request.end, call.deadline
        )
        return pb.PrefetchResponse(
            generation=loaded.generation, length=loaded.length, resident_bytes=loaded.resident_bytes
        )

    async def Append(self, requests: AsyncIterator[pb.AppendRequest | CutFrame], call: Call) -> pb.AppendResponse:
        incoming = aiter(requests)
        first = await anext(incoming, None)
        if not isinstance(first, pb.AppendRequest) or first.WhichOneof("body") != "header":
            raise InvalidArgument("header", "the first message must be the header")
        header = convert.header_from(first.header)
        async with self._sessions.appending.begin(call.tenant, header, call.deadline) as append:
            async for request in incoming:
                await append.add(convert.frame_from(request))
            result = await append.commit()
        return pb.AppendResponse(
            generation=result.generation,
            length=result.length,
            already_present=result.already_present,
            digest=result.digest,
            stored_bytes=result.stored_bytes,
        )

    async def Score(self, request: pb.ScoreRequest, call: Call) -> AsyncIterator[pb.ScoreResponse]:
        query = self._query(request, request.token_end)
        parts = self._sessions.querying.score(call.tenant, query, request.token_start, call.deadline)
        async for answer in parts:
            yield pb.ScoreResponse(
                generation=answer.generation,
                length=answer.length,
                token_start=answer.start,
                scores=convert.tensor_to(answer.scores),
                fidelity=convert.fidelity_to(answer.fidelity),
            )

    async def TopK(self, request: pb.TopKRequest, call: Call) -> pb.TopKResponse:
        answer = await self._sessions.querying.top_k(
            call.tenant,
            self._query(request, request.end),
            request.k,
            request.oversampling if request.rescore else None,
            call.deadline,
        )
        return pb.TopKResponse(
            generation=answer.generation,
            length=answer.length,
            positions=convert.tensor_to(answer.positions),
            scores=convert.tensor_to(answer.scores),
            fidelity=convert.fidelity_to(answer.fidelity),
        )

    async def Attend(self, receive: Receive, call: Call, outbox: Outbox) -> None:
        querying, telemetry = self._sessions.querying, self._sessions.telemetry
        await AttendStream(querying, self._limits, call.tenant, self._admission, telemetry, outbox).run(receive)

    def Fetch(self, request: pb.FetchRequest, call: Call) -> AsyncIterator[pb.FetchResponse | bytes]:
        return fetch_responses(self._sessions.fetching, self._limits, call.tenant, request, call.deadline)

    async def PutProjection(
        self, requests: AsyncIterator[pb.PutProjectionRequest], call: Call
    ) -> pb.PutProjectionResponse:
        data, limit = bytearray(), self._limits.projection_bytes_max
        async for request in requests:
            if len(data) + len(request.data) > limit:
                raise InvalidArgument("data", f"a projection has at most {limit} bytes", limit=limit)
            data += request.data
        sha256, present = await self._sessions.projecting.put(data)
        return pb.PutProjectionResponse(sha256=sha256, already_present=present)

    async def GetProjection(
        self, request: pb.GetProjectionRequest, call: Call
    ) -> AsyncIterator[pb.GetProjectionResponse]:
        data, step = await self._sessions.projecting.get(request.sha256), self._limits.frame_bytes_max
        for start in range(0, len(data), step):
            yield pb.GetProjectionResponse(data=bytes(data[start : start + step]))

    async def ListProjections(self, request: pb.ListProjectionsRequest, call: Call) -> pb.ListProjectionsResponse:
        found, token = await self._sessions.projecting.page(request.page_size, request.page_token)
        projections = [
            pb.ListProjectionsResponse.Projection(
                sha256=info.sha256,
                bytes=info.size,
                model_fingerprint=info.model_fingerprint,
                header_json=info.header_json,
            )
            for info in found
        ]
        return pb.ListProjectionsResponse(projections=projections, next_page_token=token)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.GetServerInfoResponse:
        return self._info

    def _query(self, request: pb.ScoreRequest | pb.TopKRequest, end: int) -> Query:
        return Query(
            session=request.session,
            generation=request.generation if request.HasField("generation") else None,
            layer=request.layer,
            end=end,
            q=convert.tensor_from(request.q, "q", dims=3),
            head_offset=request.head_offset,
            precision=convert.precision_from(request.precision),
        )


def server_info(
    version: str, device: str, sessions: SessionService, store: str, index: str
) -> pb.GetServerInfoResponse:
    """The constant answer of GetServerInfo."""
    default = sessions.default_codec.model_dump(mode="json")
    return pb.GetServerInfoResponse(
        version=version,
        device=device,
        limits=sessions.limits.as_dict(),
        codecs=CODECS,
        default_codec_json=json.dumps(default, sort_keys=True, separators=(",", ":")),
        format_version=VERSION,
        store=store,
        index=index,
    )
