"""Answers of Attend steps as bytes: their numbers go from the device into the message without a stop in another.

The fields are those that protobuf would write, in its order; what steps have in common is serialised once.
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from math import prod

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
    out, factor = answers[0].out, LSE_FACTORS[lse_base]
    shape = sum([len(answer.lse.array) for answer in answers]), *out.array.shape[1:]
    items = tuple([(answer.generation, answer.length, answer.fidelity[:-1]) for answer in answers])
    before_out, before_lse, *between = _frame(out.dtype, shape, lse_base, items)
    parts = [_ID, varint(request_id), before_out]
    parts += [answer.out.array.tobytes() for answer in answers]
    parts.append(before_lse)
    parts += [(answer.lse.array if factor == 1 else answer.lse.array * factor).tobytes() for answer in answers]
    for before, answer in zip(between, answers, strict=False):
        parts += (before, _DOUBLE.pack(answer.fidelity.score_stderr))
    parts.append(between[-1])
    return b"".join(parts)


@lru_cache(_KINDS_MAX)
def _frame(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    lse_base: pb.LseBase.ValueType,
    items: tuple[tuple[str, int, tuple], ...],
) -> list[bytes]:
    """What is around the numbers: before out, before lse, before the standard error of each item, and at the end."""
    rows, heads, _ = shape
    frame = [tensor_head(_OUT, dtype, shape), tensor_head(_LSE, torch.float32, (rows, heads)), _units(lse_base)]
    for generation, length, worth in items:
        before, after = _item(generation, length, *worth)
        frame[-1] += before
        frame.append(after)
    numbers = prod(shape) * dtype.itemsize + rows * heads * 4 + len(items) * _DOUBLE.size
    frame[0] = _RESULT + varint(sum(map(len, frame)) + numbers) + frame[0]
    return frame


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
