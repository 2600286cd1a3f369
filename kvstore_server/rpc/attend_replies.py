"""Answers of Attend steps as bytes: their numbers go from the device into the message without a stop in another.

The fields are those that protobuf would write, in its order.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_server.rpc.convert import DTYPE_NUMBERS, LSE_FACTORS, fill_fidelity
from kvstore_server.sessions.model import AttendAnswer

_RESULT, _OUT, _LSE, _DATA = (
    bytes([number << 3 | 2])
    for number in (
        pb.AttendResponse.RESULT_FIELD_NUMBER,
        pb.AttendResult.OUT_FIELD_NUMBER,
        pb.AttendResult.LSE_FIELD_NUMBER,
        pb.Tensor.DATA_FIELD_NUMBER,
    )
)


def encode_attended(request_id: int, answers: Sequence[AttendAnswer], lse_base: pb.LseBase.ValueType) -> bytes:
    """The AttendResponse of a step: the rows of its items, in their order."""
    result = pb.AttendResult(lse_base=lse_base or pb.LSE_BASE_E, lse_layout=pb.LSE_LAYOUT_TOKEN_MAJOR)
    for answer in answers:
        item = result.items.add()
        item.generation, item.length = answer.generation, answer.length
        fill_fidelity(item.fidelity, answer.fidelity)
    rows, first, factor = sum([len(answer.lse.array) for answer in answers]), answers[0], LSE_FACTORS[lse_base]
    parts = [_head(_OUT, first.out.dtype, (rows, *first.out.array.shape[1:]))]
    parts += [answer.out.array.tobytes() for answer in answers]
    parts.append(_head(_LSE, torch.float32, (rows, *first.lse.array.shape[1:])))
    parts += [(answer.lse.array if factor == 1 else answer.lse.array * factor).tobytes() for answer in answers]
    parts.append(result.SerializeToString())
    size = sum(map(len, parts))
    return b"".join((pb.AttendResponse(request_id=request_id).SerializeToString(), _RESULT, _varint(size), *parts))


@lru_cache(1024)
def _head(tag: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """A Tensor field up to its data."""
    size = prod(shape) * dtype.itemsize
    head = pb.Tensor(dtype=DTYPE_NUMBERS[dtype], shape=shape).SerializeToString() + _DATA + _varint(size)
    return tag + _varint(len(head) + size) + head


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
