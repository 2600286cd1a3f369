"""For every RPC of the protocol a request about one session, and how it is answered where the caller may ask."""

import torch

from kvstore_codecs.spec import RAW, ModelShape
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.convert import shape_to

SHAPE = ModelShape(layers=1, kv_heads=1, query_heads=1, head_dim=32, dtype="float32", sm_scale=1.0)
TOKENS = 2
VECTORS = torch.ones(TOKENS, 1, 32).numpy().tobytes()
Q = pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, 1, 32], data=torch.ones(32).numpy().tobytes())


def block_hash(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")[:32]


def create(name: str) -> list[pb.CreateSessionRequest]:
    return [pb.CreateSessionRequest(name=name, shape=shape_to(SHAPE), codec_json=RAW.model_dump_json())]


def append(name: str, start: int = TOKENS) -> list[pb.AppendRequest]:
    header = pb.AppendHeader(
        session=name,
        start=start,
        tokens=TOKENS,
        bytes=2 * len(VECTORS),
        encoding=pb.ENCODING_RAW,
        block_hashes=[block_hash(name)],
        block_tokens=TOKENS,
    )
    frames = [
        pb.AppendFrame(layer=0, kind=kind, part=pb.PART_ROWS, tokens=TOKENS, heads=1, data=VECTORS)
        for kind in (pb.KIND_KEYS, pb.KIND_VALUES)
    ]
    return [pb.AppendRequest(header=header), *(pb.AppendRequest(frame=frame) for frame in frames)]


def attend(name: str) -> list[pb.AttendRequest]:
    item = pb.AttendStep.Item(handle=1, end=TOKENS, rows=1)
    step = pb.AttendStep(request_id=1, timeout_ms=10_000, layer=0, items=[item], q=Q)
    return [pb.AttendRequest(bind=pb.AttendBind(handle=1, session=name)), pb.AttendRequest(step=step)]


REQUESTS = {
    "CreateSession": create,
    "GetSession": lambda name: [pb.GetSessionRequest(name=name)],
    "ListSessions": lambda name: [pb.ListSessionsRequest(prefix=name)],
    "UpdateSession": lambda name: [pb.UpdateSessionRequest(name=name, pinned=True)],
    "DeleteSession": lambda name: [pb.DeleteSessionRequest(name=name)],
    "ForkSession": lambda name: [pb.ForkSessionRequest(source=name, name=f"{name}-fork")],
    "MatchPrefix": lambda name: [pb.MatchPrefixRequest(block_hashes=[block_hash(name)])],
    "Prefetch": lambda name: [pb.PrefetchRequest(session=name, end=TOKENS)],
    "Append": append,
    "Score": lambda name: [pb.ScoreRequest(session=name, q=Q, token_end=TOKENS)],
    "TopK": lambda name: [pb.TopKRequest(session=name, q=Q, end=TOKENS, k=1)],
    "Attend": attend,
    "Fetch": lambda name: [pb.FetchRequest(session=name, token_end=TOKENS)],
    "PutProjection": lambda name: [pb.PutProjectionRequest(data=name.encode())],
    "GetProjection": lambda name: [pb.GetProjectionRequest(sha256="0" * 64)],
    "ListProjections": lambda name: [pb.ListProjectionsRequest()],
    "GetServerInfo": lambda name: [pb.GetServerInfoRequest()],
}
OF_A_SESSION = {
    *("GetSession", "UpdateSession", "ForkSession", "Prefetch"),
    *("Append", "Score", "TopK", "Attend", "Fetch"),
}
"""NOT_FOUND where the tenant has no such session."""
ALWAYS = {"PutProjection": "INVALID_ARGUMENT", "GetProjection": "NOT_FOUND"}
"""Of requests that are let in and then found wrong, whatever session."""


def expected(method: str, target: str) -> str:
    """The code for a caller whose role is enough."""
    if method in OF_A_SESSION and target != "own":
        return "NOT_FOUND"
    return ALWAYS.get(method, "OK")
