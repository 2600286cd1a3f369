"""Append and Fetch messages without protobuf's copies: the same bytes, with the data copied once.

A protobuf `bytes` field takes only `bytes`, so building and serialising a frame copies its data twice more.
"""

from dataclasses import dataclass

from kvstore_proto.cut import cut
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint

_FRAME_TAG = bytes([pb.AppendRequest.FRAME_FIELD_NUMBER << 3 | 2])
_DATA_TAG = bytes([pb.AppendFrame.DATA_FIELD_NUMBER << 3 | 2])
_TENSOR_DATA = (
    pb.FetchResponse.PART_FIELD_NUMBER,
    pb.FetchPart.TENSOR_FIELD_NUMBER,
    pb.Tensor.DATA_FIELD_NUMBER,
)


@dataclass(frozen=True)
class Frame:
    """One AppendFrame: `head` without data, and the data as it lies in memory."""

    head: pb.AppendFrame
    data: memoryview


def encode_append(request: pb.AppendHeader | Frame) -> bytes:
    """The bytes of the AppendRequest that holds `request`."""
    if isinstance(request, pb.AppendHeader):
        return pb.AppendRequest(header=request).SerializeToString()
    head = request.head.SerializeToString()
    size = request.data.nbytes
    if not size:
        return b"".join((_FRAME_TAG, varint(len(head)), head))
    data_head = _DATA_TAG + varint(size)
    return b"".join((_FRAME_TAG, varint(len(head) + len(data_head) + size), head, data_head, request.data))


@dataclass(frozen=True)
class Part:
    """One FetchPart: `head` without its tensor, `tensor` without its data, and the data where gRPC put it."""

    head: pb.FetchPart
    tensor: pb.Tensor
    data: memoryview


def decode_fetch(message: bytes) -> pb.FetchHeader | Part:
    """What a FetchResponse holds. DecodeError if the bytes are none."""
    if (found := cut(message, _TENSOR_DATA)) is not None:
        (_, head, tensor), data = found
        return Part(pb.FetchPart.FromString(head), pb.Tensor.FromString(tensor), data)
    reply = pb.FetchResponse.FromString(message)
    if reply.HasField("part"):
        return Part(reply.part, reply.part.tensor, memoryview(reply.part.tensor.data))
    return reply.header
