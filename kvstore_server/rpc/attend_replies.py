"""Answers of Attend steps as bytes: their numbers go from the device into the message without a stop in another.

The fields are those that protobuf would write, in its order; what steps have in common is serialised once.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint
from kvstore_server.rpc.convert import LSE_FACTORS, fill_fidelity, tensor_head
from kvstore_server.sessions.model import AttendAnswer, Fidelity

_ID = bytes([pb.AttendResponse.REQUEST_ID_FIELD_NUMBER << 3])
_RESULT, _OUT, _LSE = (
    bytes([number << 3 | 2])
    for number in (
        pb.AttendResponse.RESULT_FIELD_NUMBER,
        pb.AttendResult.OUT_FIELD_NUMBER,
        pb.AttendResult.LSE_FIELD_NUMBER,
    )
)
_DOUBLE = struct.Struct("<d")
_HOLE = b"\xf5\xf6\xf7\xf8\xf9\xfa\xfb\x3f"
"""A double; in UTF-8 there are no such bytes."""
_KINDS_MAX = 1024


def encode_attended(request_id: int, answers: Sequence[AttendAnswer], lse_base: pb.LseBase.ValueType) -> bytes:
    """The AttendResponse of a step: the rows of its items, in their order."""
    rows, first, factor = sum([len(answer.lse.array) for answer in answers]), answers[0], LSE_FACTORS[lse_base]
    parts = [tensor_head(_OUT, first.out.dtype, (rows, *first.out.array.shape[1:]))]
    parts += [answer.out.array.tobytes() for answer in answers]
    parts.append(tensor_head(_LSE, torch.float32, (rows, *first.lse.array.shape[1:])))
    parts += [(answer.lse.array if factor == 1 else answer.lse.array * factor).tobytes() for answer in answers]
    parts.append(_units(lse_base))
    for answer in answers:
        *worth, error = answer.fidelity
        before, after = _item(answer.generation, answer.length, *worth)
        parts += (before, _DOUBLE.pack(error), after)
    return b"".join((_ID, varint(request_id), _RESULT, varint(sum(map(len, parts))), *parts))


@lru_cache(_KINDS_MAX)
def _units(lse_base: pb.LseBase.ValueType) -> bytes:
    """In which the lse is."""
    return pb.AttendResult(lse_base=lse_base or pb.LSE_BASE_E, lse_layout=pb.LSE_LAYOUT_TOKEN_MAJOR).SerializeToString()


@lru_cache(_KINDS_MAX)
def _item(generation: str, length: int, *worth: object) -> tuple[bytes, bytes]:
    """An Item up to its standard error, and from there on."""
    result = pb.AttendResult()
    item = result.items.add(generation=generation, length=length)
    fill_fidelity(item.fidelity, Fidelity(*worth, *_DOUBLE.unpack(_HOLE)))  # pyright: ignore[reportArgumentType]
    before, after = result.SerializeToString().split(_HOLE)
    return before, after
