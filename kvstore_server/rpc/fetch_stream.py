"""Fetch as a stream: a header that says what is stored, then parts no larger than a frame."""

from collections.abc import AsyncIterator, Iterator

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.errors import InvalidArgument
from kvstore_server.limits import Limits
from kvstore_server.rpc import convert
from kvstore_server.sessions.model import FetchPart
from kvstore_server.sessions.querying import FetchQuery, Querying


async def fetch_responses(
    querying: Querying, limits: Limits, tenant: str, request: pb.FetchRequest, deadline: float
) -> AsyncIterator[pb.FetchResponse]:
    """The answer of one Fetch."""
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
    answer = await querying.fetch(tenant, query, deadline)
    header = pb.FetchHeader(session=convert.session_to(answer.info), token_start=query.start, token_end=query.end)
    if answer.fit is not None:
        header.mean_keys.CopyFrom(convert.tensor_to(answer.fit.mean_keys))
        header.mean_values.CopyFrom(convert.tensor_to(answer.fit.mean_values))
        header.fit_token_start, header.fit_token_end = answer.fit.token_start, answer.fit.token_end
    facts = {"generation": answer.info.generation, "length": answer.info.length}
    yield pb.FetchResponse(header=header, **facts)
    async for part in answer.parts:
        for piece in _pieces(part, limits.frame_bytes_max):
            message = pb.FetchPart(
                layer=piece.layer,
                kind=convert.KIND_NUMBERS[piece.kind],
                part=convert.PART_NUMBERS[piece.part],
                token_start=piece.start,
                tensor=convert.tensor_to(piece.tensor),
            )
            yield pb.FetchResponse(part=message, **facts)


def _pieces(part: FetchPart, bytes_max: int) -> Iterator[FetchPart]:
    """The part cut along tokens."""
    per_token = max(1, part.tensor[0].nbytes)
    step = max(1, bytes_max // per_token)
    for first in range(0, part.tensor.shape[0], step):
        tensor = part.tensor[first : first + step]
        yield FetchPart(part.layer, part.kind, part.part, part.start + first, tensor)
