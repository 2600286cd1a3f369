"""Every wrong field answers its code, names itself, and leaves the session as it was."""

from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.rpc import error_details_pb2, status_pb2

from kvstore_codecs.spec import RAW, CodecSpec, ModelShape, Rotated
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreServiceStub
from kvstore_server.rpc.convert import shape_to

from ..running import serving

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype="float32", sm_scale=0.2)
TOKENS = 6
TOKEN_BYTES = 2 * 32 * 4


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    async with (
        serving(tmp_path) as server,
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        stub: Any = KVStoreServiceStub(channel)
        codec = CodecSpec(keys=Rotated(planes=2), values=Rotated(planes=2), sink_tokens=2, fit_tokens=3)
        create = pb.CreateSessionRequest(name="s", shape=shape_to(SHAPE), codec_json=codec.model_dump_json())
        await stub.CreateSession(create)
        await stub.Append(append())
        yield stub


def header(**changes: Any) -> pb.AppendHeader:
    facts = {
        "session": "s",
        "generation": "",
        "start": 0,
        "tokens": TOKENS,
        "bytes": 4 * TOKENS * TOKEN_BYTES,
        "encoding": pb.ENCODING_RAW,
    }
    return pb.AppendHeader(**{**facts, **changes})


def frames(value: float = 1.0, **changes: Any) -> list[pb.AppendRequest]:
    """All frames of the append that `header` announces; `changes` go to the last one."""
    data = torch.full((TOKENS, 2, 32), value).add_(torch.arange(TOKENS).view(-1, 1, 1)).numpy().tobytes()
    made = [
        {"layer": layer, "kind": kind, "part": pb.PART_ROWS, "tokens": TOKENS, "heads": 2, "data": data}
        for layer in range(2)
        for kind in (pb.KIND_KEYS, pb.KIND_VALUES)
    ]
    made[-1].update(changes)
    return [pb.AppendRequest(frame=pb.AppendFrame(**each)) for each in made]


def append(head: pb.AppendHeader | None = None, body: list[pb.AppendRequest] | None = None) -> list[pb.AppendRequest]:
    return [pb.AppendRequest(header=head or header()), *(frames() if body is None else body)]


def tensor(*shape: int, value: float = 0.5) -> pb.Tensor:
    data = torch.full(shape, value).numpy().tobytes()
    return pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=shape, data=data)


def details(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    """(code, facts) of an error; every error of ours has an ErrorInfo."""
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return error.code().name, dict(info.metadata)


async def refused(call: Any) -> tuple[str, dict[str, str]]:
    """How a unary call or a response stream is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_drained(call) if hasattr(call, "__aiter__") else call)
    return details(caught.value)


async def _drained(responses: AsyncIterable[object]) -> None:
    async for _ in responses:
        pass


NAMES = ["", "a/b", "..", ".", "_own", "-x", "a\x00b", "ä", "a" * 129, "a" * 300, "a b", "../../etc"]


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_is_not_allowed_is_refused_everywhere(stub: Any, name: str) -> None:
    for call, field in (
        (stub.CreateSession(pb.CreateSessionRequest(name=name, shape=shape_to(SHAPE))), "name"),
        (stub.GetSession(pb.GetSessionRequest(name=name)), "name"),
        (stub.DeleteSession(pb.DeleteSessionRequest(name=name)), "name"),
        (stub.UpdateSession(pb.UpdateSessionRequest(name=name)), "name"),
        (stub.ForkSession(pb.ForkSessionRequest(source="s", name=name)), "name"),
        (stub.ForkSession(pb.ForkSessionRequest(source=name, name="t")), "source"),
        (stub.Append(append(header(session=name))), "header.session"),
        (stub.TopK(pb.TopKRequest(session=name, q=tensor(1, 4, 32), end=1, k=1)), "session"),
        (stub.Score(pb.ScoreRequest(session=name, q=tensor(1, 4, 32), token_end=1)), "session"),
        (stub.Fetch(pb.FetchRequest(session=name, token_end=1)), "session"),
        (stub.Prefetch(pb.PrefetchRequest(session=name)), "session"),
    ):
        assert await refused(call) == ("INVALID_ARGUMENT", {"field": field, "limit": "128"})


async def test_an_unknown_session_is_not_found(stub: Any) -> None:
    for call in (
        stub.GetSession(pb.GetSessionRequest(name="t")),
        stub.Append(append(header(session="t"))),
        stub.TopK(pb.TopKRequest(session="t", q=tensor(1, 4, 32), end=1, k=1)),
        stub.Fetch(pb.FetchRequest(session="t", token_end=1)),
        stub.ForkSession(pb.ForkSessionRequest(source="t", name="u")),
    ):
        assert (await refused(call))[0] == "NOT_FOUND"


def shape_with(**changes: Any) -> pb.ModelShape:
    message = shape_to(SHAPE)
    for name, value in changes.items():
        if name in ("dtype", "sm_scale", "logit_soft_cap"):
            setattr(message, name, value)
        else:
            setattr(message.layer_groups[0], name, value)
    return message


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        (pb.ModelShape(), "shape.layer_groups"),
        (shape_with(count=0), "shape.layers"),
        (shape_with(count=5000), "shape.layers"),
        (shape_with(kv_heads=0), "shape.kv_heads"),
        (shape_with(kv_heads=3), "shape"),
        (shape_with(query_heads=100_000), "shape.query_heads"),
        (shape_with(k_dim=33, v_dim=33), "shape.head_dim"),
        (shape_with(k_dim=512, v_dim=512), "shape.head_dim"),
        (shape_with(v_dim=64), "shape.layer_groups"),
        (shape_with(dtype=99), "shape.dtype"),
        (shape_with(dtype=0), "shape.dtype"),
        (shape_with(sm_scale=-1.0), "shape.sm_scale"),
        (shape_with(sm_scale=float("inf")), "shape.sm_scale"),
        (shape_with(logit_soft_cap=float("nan")), "shape.logit_soft_cap"),
    ],
)
async def test_a_wrong_shape_names_its_field(stub: Any, shape: pb.ModelShape, field: str) -> None:
    code, facts = await refused(stub.CreateSession(pb.CreateSessionRequest(name="t", shape=shape)))
    assert (code, facts["field"]) == ("INVALID_ARGUMENT", field)


@pytest.mark.parametrize(
    "codec",
    ["", "{}", "[", "null", '{"keys": {"name": "zip"}, "values": {"name": "raw"}}', "[" * 100_000, "{" + " " * 70_000],
)
async def test_a_wrong_codec_is_refused(stub: Any, codec: str) -> None:
    request = pb.CreateSessionRequest(name="t", shape=shape_to(SHAPE), codec_json=codec)
    code, facts = await refused(stub.CreateSession(request))
    assert code == "INVALID_ARGUMENT"
    assert facts["field"].startswith("codec_json")


async def test_another_shape_or_codec_under_the_same_name_is_refused(stub: Any) -> None:
    request = pb.CreateSessionRequest(name="s", shape=shape_to(SHAPE), codec_json=RAW.model_dump_json())
    assert (await refused(stub.CreateSession(request)))[0] == "ALREADY_EXISTS"


BAD_HEADERS: list[tuple[dict[str, Any], str, str]] = [
    ({"tokens": 0}, "INVALID_ARGUMENT", "header.tokens"),
    ({"tokens": 2**31}, "INVALID_ARGUMENT", "header.tokens"),
    ({"bytes": 2**60}, "INVALID_ARGUMENT", "header.bytes"),
    ({"bytes": 5}, "INVALID_ARGUMENT", "header.bytes"),
    ({"start": 2**63}, "INVALID_ARGUMENT", "header.start"),
    ({"start": TOKENS + 1}, "OUT_OF_RANGE", ""),
    ({"encoding": 0}, "INVALID_ARGUMENT", "header.encoding"),
    ({"encoding": 9}, "INVALID_ARGUMENT", "header.encoding"),
    ({"encoding": pb.ENCODING_SKETCH, "start": TOKENS}, "FAILED_PRECONDITION", ""),
    ({"generation": "7"}, "ABORTED", ""),
    ({"block_hashes": [b"short"]}, "INVALID_ARGUMENT", "header.block_hashes"),
    ({"block_hashes": [b"h" * 32]}, "INVALID_ARGUMENT", "header.block_tokens"),
    ({"block_tokens": 1}, "INVALID_ARGUMENT", "header.block_tokens"),
]


@pytest.mark.parametrize(("changes", "code", "field"), BAD_HEADERS)
async def test_a_header_that_cannot_be_is_refused(stub: Any, changes: dict[str, Any], code: str, field: str) -> None:
    found, facts = await refused(stub.Append(append(header(**changes))))
    assert (found, facts.get("field", "")) == (code, field)
    assert await length(stub) == TOKENS


ROW = TOKENS * TOKEN_BYTES
BAD_FRAMES: list[tuple[dict[str, Any], str]] = [
    ({"layer": 2}, "frame.layer"),
    ({"kind": 0}, "frame.kind"),
    ({"kind": 7}, "frame.kind"),
    ({"part": 0}, "frame.part"),
    ({"part": pb.PART_WORDS}, "frame.part"),
    ({"tokens": 0}, "frame.tokens"),
    ({"tokens": TOKENS + 1}, "frame.tokens"),
    ({"token_offset": 2**31}, "frame.tokens"),
    ({"heads": 3}, "frame.heads"),
    ({"heads": 0}, "frame.heads"),
    ({"head_offset": 1}, "frame.heads"),
    ({"data": b"x" * (ROW - 1)}, "frame.data"),
    ({"data": b""}, "frame.data"),
    ({"layer": 0}, "frame.token_offset"),
    ({"data": torch.full((TOKENS * 64,), torch.nan).numpy().tobytes()}, "frame.data"),
    ({"data": torch.full((TOKENS * 64,), torch.inf).numpy().tobytes()}, "frame.data"),
]


@pytest.mark.parametrize(("changes", "field"), BAD_FRAMES)
async def test_a_frame_that_does_not_fit_is_refused(stub: Any, changes: dict[str, Any], field: str) -> None:
    code, facts = await refused(stub.Append(append(header(start=TOKENS), frames(**changes))))
    assert (code, facts["field"]) == ("INVALID_ARGUMENT", field)
    assert await length(stub) == TOKENS


async def test_a_scale_beyond_fp16_is_refused(stub: Any) -> None:
    huge = torch.full((TOKENS * 64,), 3e7).mul_(torch.randn(TOKENS * 64)).numpy().tobytes()
    code, facts = await refused(stub.Append(append(header(start=TOKENS), frames(data=huge))))
    assert (code, facts["field"]) == ("INVALID_ARGUMENT", "frame.data")
    assert await length(stub) == TOKENS


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "header"),
        (frames(), "header"),
        ([pb.AppendRequest()], "header"),
        (append(header(start=TOKENS), []), "frames"),
        (append(header(start=TOKENS), frames()[:-1]), "frames"),
        ([*append(header(start=TOKENS)), pb.AppendRequest(header=header())], "frame"),
    ],
)
async def test_a_stream_that_lies_or_is_cut_is_refused(stub: Any, requests: list[pb.AppendRequest], field: str) -> None:
    code, facts = await refused(stub.Append(requests))
    assert (code, facts["field"]) == ("INVALID_ARGUMENT", field)
    assert await length(stub) == TOKENS


async def test_other_bytes_at_a_taken_position_are_refused(stub: Any) -> None:
    code, facts = await refused(stub.Append(append(body=frames(value=2.0))))
    assert code == "ALREADY_EXISTS"
    assert facts["length"] == str(TOKENS)
    again = await stub.Append(append())
    assert again.already_present
    assert again.length == TOKENS


BAD_QUERIES: list[tuple[dict[str, Any], str, str]] = [
    ({"layer": 2}, "INVALID_ARGUMENT", "layer"),
    ({"q": tensor(1, 5, 32)}, "INVALID_ARGUMENT", "head_offset"),
    ({"head_offset": 1}, "INVALID_ARGUMENT", "head_offset"),
    ({"q": tensor(1, 4, 64)}, "INVALID_ARGUMENT", "q.shape"),
    ({"q": tensor(4, 32)}, "INVALID_ARGUMENT", "q.shape"),
    ({"q": pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[2**40, 4, 32], data=b"")}, "INVALID_ARGUMENT", "q.shape"),
    ({"q": pb.Tensor(dtype=pb.DTYPE_FLOAT32, shape=[1, 4, 32], data=b"123")}, "INVALID_ARGUMENT", "q.data"),
    ({"q": pb.Tensor(dtype=pb.DTYPE_INT64, shape=[1, 4, 32], data=bytes(1024))}, "INVALID_ARGUMENT", "q.dtype"),
    ({"q": tensor(1, 4, 32, value=torch.nan)}, "INVALID_ARGUMENT", "q"),
    ({"q": tensor(1025, 1, 32)}, "INVALID_ARGUMENT", "q.shape"),
    ({"end": TOKENS + 1}, "OUT_OF_RANGE", ""),
    ({"end": 2**63}, "OUT_OF_RANGE", ""),
    ({"generation": "7"}, "ABORTED", ""),
    ({"precision": pb.Precision(keys_level=9, require_precision=True)}, "FAILED_PRECONDITION", ""),
]


@pytest.mark.parametrize(("changes", "code", "field"), BAD_QUERIES)
async def test_a_query_that_does_not_fit_is_refused(stub: Any, changes: dict[str, Any], code: str, field: str) -> None:
    facts: dict[str, Any] = {"session": "s", "q": tensor(1, 4, 32), "end": TOKENS, **changes}
    found, said = await refused(stub.TopK(pb.TopKRequest(k=2, **facts)))
    assert (found, said.get("field", "")) == (code, field)
    facts["token_end"] = facts.pop("end")
    found, said = await refused(stub.Score(pb.ScoreRequest(**facts)))
    assert (found, said.get("field", "")) == (code, field)


@pytest.mark.parametrize("k", [0, 2**31])
async def test_a_k_outside_its_limit_is_refused(stub: Any, k: int) -> None:
    code, facts = await refused(stub.TopK(pb.TopKRequest(session="s", q=tensor(1, 4, 32), end=TOKENS, k=k)))
    assert (code, facts["field"]) == ("INVALID_ARGUMENT", "k")
    assert "limit" in facts


async def test_a_message_over_the_limit_is_refused(stub: Any) -> None:
    request = pb.CreateSessionRequest(name="t", codec_json="x" * (17 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.CreateSession(request)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await length(stub) == TOKENS


async def test_an_error_repeats_so_little_of_what_was_sent_that_it_arrives(stub: Any) -> None:
    """gRPC would answer RESOURCE_EXHAUSTED of its own for trailers over its bound."""
    for generation in ("x" * 70_000, "\u202e" * 70_000):
        fork = pb.ForkSessionRequest(source="s", source_generation=generation, name="t")
        code, facts = await refused(stub.ForkSession(fork))
        assert code == "ABORTED"
        assert max(map(len, facts.values())) <= 128


async def length(stub: Any) -> int:
    return (await stub.GetSession(pb.GetSessionRequest(name="s"))).session.length
