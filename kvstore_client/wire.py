"""Append messages without protobuf's copies: the same bytes, with the frame's data copied once.

A protobuf `bytes` field takes only `bytes`, so building and serialising a frame copies its data twice more.
"""

from dataclasses import dataclass

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import varint

_FRAME_TAG = bytes([pb.AppendRequest.FRAME_FIELD_NUMBER << 3 | 2])
_DATA_TAG = bytes([pb.AppendFrame.DATA_FIELD_NUMBER << 3 | 2])


@dataclass(frozen=True)
class Frame:
    """One AppendFrame: `head` without data, and the data as it lies in memory."""

    head: pb.AppendFrame
    data: memoryview


def encode_append(request: pb.AppendHeader | Frame | bytes) -> bytes:
    """The bytes of the AppendRequest that holds `request`, or that it is already."""
    if isinstance(request, bytes):
        return request
    if isinstance(request, pb.AppendHeader):
        return pb.AppendRequest(header=request).SerializeToString()
    head = request.head.SerializeToString()
    size = request.data.nbytes
    if not size:
        return b"".join((_FRAME_TAG, varint(len(head)), head))
    data_head = _DATA_TAG + varint(size)
    return b"".join((_FRAME_TAG, varint(len(head) + len(data_head) + size), head, data_head, request.data))
