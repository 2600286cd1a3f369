"""Valid calls of every RPC about a small session: what mutation starts from."""

from collections.abc import Sequence
from hashlib import sha256
from random import Random
from typing import Any

import torch

from kvstore_codecs.spec import RAW, Affine, CodecSpec, ModelShape, Qjl, Rotated
from kvstore_kernels import as_torch_dtype
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.convert import DTYPE_NUMBERS, shape_to, tensor_to

from ..one_of_each import block_hash

TOKENS = 6
"""Of every session in stock: for the codecs with a fit two exact ones, three that make it and a sketched one."""


def _shape(dtype: Any) -> ModelShape:
    return ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype=dtype, sm_scale=0.2)


STOCK: dict[str, tuple[ModelShape, CodecSpec]] = {
    "plain": (_shape("float32"), RAW),
    "signs": (_shape("float32"), CodecSpec(keys=Rotated(planes=2), values=Rotated(), sink_tokens=2, fit_tokens=3)),
    "mixed": (
        _shape("float16"),
        CodecSpec(keys=Qjl(bits=64, outlier_channels=(3,)), values=Affine(), sink_tokens=0, fit_tokens=1),
    ),
}
"""By the first part of the name, before a dot."""


def of_stock(name: str) -> tuple[ModelShape, CodecSpec]:
    return STOCK[name.partition(".")[0]]


def create(name: str) -> list[Any]:
    shape, codec = of_stock(name)
    return [pb.CreateSessionRequest(name=name, shape=shape_to(shape), codec_json=codec.model_dump_json())]


def append(name: str, start: int, tokens: int, seed: int) -> list[Any]:
    """A header and, for each layer and kind, one frame."""
    shape, _ = of_stock(name)
    source = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, shape.layers, tokens, shape.kv_heads, shape.head_dim, generator=source)
    rows = rows.to(as_torch_dtype(shape.dtype))
    header = pb.AppendHeader(
        session=name,
        start=start,
        tokens=tokens,
        bytes=rows.nbytes,
        encoding=pb.ENCODING_RAW,
        block_hashes=[block_hash(f"{name} {block}") for block in range(start, start + tokens)],
        block_tokens=1,
    )
    frames = [
        pb.AppendFrame(
            layer=layer,
            kind=kind,
            part=pb.PART_ROWS,
            tokens=tokens,
            heads=shape.kv_heads,
            data=rows[number, layer].numpy().tobytes(),
        )
        for layer in range(shape.layers)
        for number, kind in enumerate((pb.KIND_KEYS, pb.KIND_VALUES))
    ]
    return [pb.AppendRequest(header=header), *(pb.AppendRequest(frame=frame) for frame in frames)]


def sketched_append(name: str, start: int, fetched: Sequence[pb.FetchResponse]) -> list[Any]:
    """The one sketched token that another session was read back with, as a client's own sketch of the next."""
    parts = [response.part for response in fetched if response.part.part in (pb.PART_WORDS, pb.PART_SCALES)]
    frames = [
        pb.AppendFrame(layer=part.layer, kind=part.kind, part=part.part, tokens=1, data=part.tensor.data)
        for part in parts
    ]
    header = pb.AppendHeader(
        session=name,
        start=start,
        tokens=1,
        bytes=sum(len(frame.data) for frame in frames),
        encoding=pb.ENCODING_SKETCH,
        fit_fingerprint=fetched[0].header.session.fit_fingerprint,
    )
    return [pb.AppendRequest(header=header), *(pb.AppendRequest(frame=frame) for frame in frames)]


def query(name: str, chance: Random, rows: int | None = None) -> pb.Tensor:
    shape, _ = of_stock(name)
    source = torch.Generator().manual_seed(chance.randrange(2**32))
    q = torch.randn(rows or chance.randint(1, 4), shape.query_heads, shape.head_dim, generator=source)
    return tensor_to(q.to(chance.choice([torch.float32, torch.float16, torch.bfloat16])))


def precision(chance: Random) -> pb.Precision:
    return pb.Precision(keys_level=chance.randint(0, 3), values_level=chance.randint(0, 3))


def attend(name: str, chance: Random) -> list[Any]:
    """Two handles, one of which is this session, and steps of either or both."""
    bind = [
        pb.AttendBind(handle=1, session=name),
        pb.AttendBind(handle=2, session=chance.choice(["plain.0", "signs.0", "mixed.0"])),
    ]
    steps = []
    for number in range(chance.randint(1, 4)):
        rows = [chance.randint(1, 2) for _ in range(chance.randint(1, 2))]
        items = [
            pb.AttendStep.Item(handle=chance.randint(1, 2), end=chance.randint(0, TOKENS), rows=count) for count in rows
        ]
        step = pb.AttendStep(
            request_id=number,
            timeout_ms=10_000,
            layer=chance.randint(0, 1),
            items=items,
            q=query(name, chance, sum(rows)),
            precision=precision(chance),
            refine=chance.choice([0, 2]),
            lse_base=chance.choice([pb.LSE_BASE_UNSPECIFIED, pb.LSE_BASE_2]),
        )
        steps.append(pb.AttendRequest(step=step))
    cancel = [pb.AttendRequest(cancel=pb.AttendCancel(request_id=0))] * chance.randint(0, 1)
    return [*(pb.AttendRequest(bind=each) for each in bind), *steps, *cancel]


def _score(name: str, chance: Random) -> list[Any]:
    q = query(name, chance)
    return [pb.ScoreRequest(session=name, q=q, token_end=chance.randint(0, TOKENS), precision=precision(chance))]


def _top_k(name: str, chance: Random) -> list[Any]:
    best = {"k": chance.randint(1, 9), "rescore": chance.random() < 0.5, "oversampling": 2.0}
    return [pb.TopKRequest(session=name, q=query(name, chance), end=TOKENS, precision=precision(chance), **best)]


def _fetch(name: str, chance: Random) -> list[Any]:
    decoded = chance.random() < 0.5
    dtype = DTYPE_NUMBERS[torch.float16] if decoded else pb.DTYPE_UNSPECIFIED
    return [pb.FetchRequest(session=name, token_end=TOKENS, layers=[0, 1], decoded=decoded, dtype=dtype)]


def calls(name: str, chance: Random, projection: bytes, sketch: Sequence[pb.FetchResponse]) -> dict[str, list[Any]]:
    """By method. `projection` is a file that the server has, `sketch` what a session of the kind "signs" holds."""
    half = len(projection) // 2
    grown = append(name, TOKENS, chance.randint(1, 3), chance.randrange(2**32))
    if sketch and name.startswith("signs") and chance.random() < 0.5:
        grown = sketched_append(name, TOKENS, sketch)
    return {
        "CreateSession": create(name),
        "GetSession": [pb.GetSessionRequest(name=name)],
        "ListSessions": [pb.ListSessionsRequest(prefix=name[:2], page_size=3, page_token=name)],
        "UpdateSession": [pb.UpdateSessionRequest(name=name, ttl_seconds=900.0, pinned=True)],
        "DeleteSession": [pb.DeleteSessionRequest(name=name)],
        "ForkSession": [
            pb.ForkSessionRequest(
                source=name, name=f"fork.{name}.{chance.randrange(9_999)}", end=chance.randint(0, TOKENS)
            )
        ],
        "MatchPrefix": [pb.MatchPrefixRequest(block_hashes=[block_hash(f"{name} {i}") for i in range(TOKENS)])],
        "Prefetch": [pb.PrefetchRequest(session=name, end=TOKENS, precision=precision(chance))],
        "Append": grown,
        "Score": _score(name, chance),
        "TopK": _top_k(name, chance),
        "Attend": attend(name, chance),
        "Fetch": _fetch(name, chance),
        "PutProjection": [pb.PutProjectionRequest(data=part) for part in (projection[:half], projection[half:])],
        "GetProjection": [pb.GetProjectionRequest(sha256=sha256(projection).hexdigest())],
        "ListProjections": [pb.ListProjectionsRequest(page_size=1)],
        "GetServerInfo": [pb.GetServerInfoRequest()],
    }
