"""The service's calls: name, how a request becomes bytes, how bytes become a reply."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from kvstore_client import wire
from kvstore_proto.v1 import kvstore_pb2 as pb

Request = TypeVar("Request")
Reply = TypeVar("Reply")
RequestMessage = TypeVar("RequestMessage", bound=Message)
ReplyMessage = TypeVar("ReplyMessage", bound=Message)

SERVICE = pb.DESCRIPTOR.services_by_name["KVStoreService"].full_name


@dataclass(frozen=True)
class Rpc(Generic[Request, Reply]):
    name: str
    encode: Callable[[Request], bytes]
    decode: Callable[[bytes], Reply]

    @property
    def path(self) -> str:
        return f"/{SERVICE}/{self.name}"


def _rpc(name: str, request: type[RequestMessage], reply: type[ReplyMessage]) -> Rpc[RequestMessage, ReplyMessage]:
    return Rpc(name, request.SerializeToString, reply.FromString)


CREATE_SESSION = _rpc("CreateSession", pb.CreateSessionRequest, pb.CreateSessionResponse)
GET_SESSION = _rpc("GetSession", pb.GetSessionRequest, pb.GetSessionResponse)
LIST_SESSIONS = _rpc("ListSessions", pb.ListSessionsRequest, pb.ListSessionsResponse)
UPDATE_SESSION = _rpc("UpdateSession", pb.UpdateSessionRequest, pb.UpdateSessionResponse)
DELETE_SESSION = _rpc("DeleteSession", pb.DeleteSessionRequest, pb.DeleteSessionResponse)
FORK_SESSION = _rpc("ForkSession", pb.ForkSessionRequest, pb.ForkSessionResponse)
MATCH_PREFIX = _rpc("MatchPrefix", pb.MatchPrefixRequest, pb.MatchPrefixResponse)
PREFETCH = _rpc("Prefetch", pb.PrefetchRequest, pb.PrefetchResponse)
APPEND = Rpc("Append", wire.encode_append, pb.AppendResponse.FromString)
SCORE = _rpc("Score", pb.ScoreRequest, pb.ScoreResponse)
TOP_K = _rpc("TopK", pb.TopKRequest, pb.TopKResponse)
ATTEND = _rpc("Attend", pb.AttendRequest, pb.AttendResponse)
FETCH = Rpc("Fetch", pb.FetchRequest.SerializeToString, wire.decode_fetch)
PUT_PROJECTION = _rpc("PutProjection", pb.PutProjectionRequest, pb.PutProjectionResponse)
GET_PROJECTION = _rpc("GetProjection", pb.GetProjectionRequest, pb.GetProjectionResponse)
LIST_PROJECTIONS = _rpc("ListProjections", pb.ListProjectionsRequest, pb.ListProjectionsResponse)
GET_SERVER_INFO = _rpc("GetServerInfo", pb.GetServerInfoRequest, pb.GetServerInfoResponse)
