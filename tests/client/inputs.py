"""What the tests of the client send and get."""

import asyncio
from collections.abc import Callable

import torch
from torch import Tensor

from kvstore_client import CodecSpec, ModelShape
from kvstore_client.info import shape_to
from kvstore_client.tensors import to_proto
from kvstore_codecs.spec import RAW
from kvstore_kernels.types import as_torch_dtype
from kvstore_proto.v1 import kvstore_pb2 as pb

from .scripted import Call, Failure

SHAPE = ModelShape(layers=2, kv_heads=2, query_heads=4, head_dim=32, dtype="float16", sm_scale=32**-0.5)
LIMITS = {"append_bytes_max": 512 << 20, "append_tokens_max": 16_384}


def session(name: str = "book", length: int = 0, codec: CodecSpec = RAW, shape: ModelShape = SHAPE, **more: object):
    """A pb.Session as a server sends it."""
    values: dict[str, object] = {"generation": "1", "affinity": f"root-of-{name}", "fitted": True, **more}
    return pb.Session(
        name=name,
        length=length,
        shape=shape_to(shape),
        codec_json=codec.model_dump_json(),
        codec_fingerprint=codec.fingerprint,
        **values,  # type: ignore[arg-type]
    )


def server_info(**limits: int) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(version="1.2.3", device="cpu", limits={**LIMITS, **limits}, codecs=["raw"])


def block(tokens: int, shape: ModelShape = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K and V [layers, tokens, kv_heads, d]."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.layers, tokens, shape.kv_heads, shape.head_dim)
    k, v = (torch.randn(size, generator=generator).to(as_torch_dtype(shape.dtype)) for _ in "kv")
    return k, v


def query(tokens: int = 1, heads: int = 4, seed: int = 0) -> Tensor:
    return torch.randn((tokens, heads, SHAPE.head_dim), generator=torch.Generator().manual_seed(seed))


class AppendLog:
    """The contract of Append for one session: what a server keeps, with faults on demand.

    `before` and `after` may raise a Failure for a header, before or after the append has been committed.
    """

    def __init__(self, length: int = 0) -> None:
        self.length = length
        self.commits: dict[int, tuple[int, int, dict[tuple[int, int, int], bytes]]] = {}
        """start -> (tokens, encoding, bytes by layer, kind and part)."""
        self._under_way = dict[int, asyncio.Event]()
        self.before: Callable[[pb.AppendHeader], None] = lambda _: None
        self.after: Callable[[pb.AppendHeader], None] = lambda _: None

    async def __call__(self, call: Call) -> pb.AppendResponse:
        header = call.requests[0].header
        end = header.start + header.tokens
        self._under_way[end] = asyncio.Event()
        try:
            return await self._append(call, header)
        finally:
            self._under_way.pop(end).set()

    async def _append(self, call: Call, header: pb.AppendHeader) -> pb.AppendResponse:
        self.before(header)
        data: dict[tuple[int, int, int], bytes] = {}
        for request in call.requests[1:]:
            frame = request.frame
            key = frame.layer, frame.kind, frame.part
            data[key] = data.get(key, b"") + frame.data
        assert sum(map(len, data.values())) == header.bytes
        if header.start > self.length and header.start in self._under_way:
            await self._under_way[header.start].wait()
        present = header.start < self.length
        if header.start > self.length:
            raise Failure("OUT_OF_RANGE", facts={"length": str(self.length)})
        if present and self.commits.get(header.start) != (header.tokens, header.encoding, data):
            raise Failure("ALREADY_EXISTS", reason="OTHER_BYTES")
        if not present:
            self.commits[header.start] = header.tokens, header.encoding, data
            self.length += header.tokens
        self.after(header)
        return pb.AppendResponse(generation=header.generation, length=self.length, already_present=present)

    def stored(self, layer: int, kind: "pb.Kind.ValueType", shape: ModelShape = SHAPE) -> Tensor:
        """All rows [tokens, kv_heads, d] of a layer and kind."""
        rows = b"".join(data[layer, kind, pb.PART_ROWS] for _, (_, _, data) in sorted(self.commits.items()))
        return torch.frombuffer(bytearray(rows), dtype=torch.float16).reshape(-1, shape.kv_heads, shape.head_dim)


def result(q: Tensor, value: float = 0.0) -> pb.AttendResult:
    """The answer of an Attend step: `value` everywhere."""
    return pb.AttendResult(
        out=to_proto(torch.full_like(q, value)),
        lse=to_proto(torch.full(q.shape[:2], value)),
        lse_base=pb.LSE_BASE_E,
        lse_layout=pb.LSE_LAYOUT_TOKEN_MAJOR,
        items=[pb.AttendResult.Item(generation="1", length=10, fidelity=pb.Fidelity(codec="raw", exact=True))],
    )
