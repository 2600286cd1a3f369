"""Fetch as a stream: a header that says what is stored, then parts no larger than a frame."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from kvstore_kernels.host import HostArray
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint
from kvstore_server.errors import InvalidArgument
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.scheduling.ahead import one_ahead
from kvstore_server.sessions.fetching import Fetching, FetchQuery
from kvstore_server.sessions.model import FetchPart

PART_BYTES = 2 << 20
"""Of a message's data: of these a stream carries most."""
_PART = bytes([pb.FetchResponse.PART_FIELD_NUMBER << 3 | 2])
_TENSOR = bytes([pb.FetchPart.TENSOR_FIELD_NUMBER << 3 | 2])


def fetch_responses(
    fetching: Fetching, limits: Limits, tenant: str, request: pb.FetchRequest, deadline: float
) -> AsyncGenerator[pb.FetchResponse | bytes]:
    """The answer of one Fetch: while a message is written the next is made."""
    return one_ahead(_responses(fetching, limits, tenant, request, deadline))


async def _responses(
    fetching: Fetching, limits: Limits, tenant: str, request: pb.FetchRequest, deadline: float
) -> AsyncGenerator[pb.FetchResponse | bytes]:
    if request.decoded and request.dtype:
        dtype = convert.DTYPES[convert.chosen({n: n for n in convert.FLOATS}, request.dtype, "dtype")]
    elif request.dtype:
        raise InvalidArgument("dtype", "is only for decoded vectors")
    else:
        dtype = None
    query = FetchQuery(
        session=request.session,
        generation=request.generation if request.HasField("generation") else None,
        layers=tuple(request.layers),
        start=request.token_start,
        end=request.token_end,
        decoded=request.decoded,
        dtype=dtype,
        precision=convert.precision_from(request.precision),
    )
    answer = await fetching.fetch(tenant, query, deadline)
    header = pb.FetchHeader(session=convert.session_to(answer.info), token_start=query.start, token_end=query.end)
    if answer.fit is not None:
        header.mean_keys.CopyFrom(convert.tensor_to(answer.fit.mean_keys))
        header.mean_values.CopyFrom(convert.tensor_to(answer.fit.mean_values))
        header.fit_token_start, header.fit_token_end = answer.fit.token_start, answer.fit.token_end
    facts = pb.FetchResponse(generation=answer.info.generation, length=answer.info.length)
    yield pb.FetchResponse(header=header, generation=facts.generation, length=facts.length)
    before = facts.SerializeToString()
    async with aclosing(answer.parts) as parts:
        async for part in parts:
            for piece in _pieces(part, min(limits.frame_bytes_max, PART_BYTES)):
                yield encode_part(before, piece)


def encode_part(before: bytes, part: FetchPart) -> bytes:
    """The FetchResponse of which `before` are the fields but for its part: as protobuf writes it, with one copy."""
    head = pb.FetchPart(
        layer=part.layer,
        kind=convert.KIND_NUMBERS[part.kind],
        part=convert.PART_NUMBERS[part.part],
        token_start=part.start,
    ).SerializeToString()
    head += convert.tensor_head(_TENSOR, part.tensor.dtype, tuple(part.tensor.shape))
    size = varint(len(head) + part.tensor.nbytes)
    return b"".join((before, _PART, size, head, HostArray.of(part.tensor).array.data))


def _pieces(part: FetchPart, bytes_max: int) -> Iterator[FetchPart]:
    """The part cut along tokens."""
    per_token = max(1, part.tensor[0].nbytes)
    step = max(1, bytes_max // per_token)
    for first in range(0, part.tensor.shape[0], step):
        tensor = part.tensor[first : first + step]
        yield FetchPart(part.layer, part.kind, part.part, part.start + first, tensor)
