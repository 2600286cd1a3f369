"""Append messages without protobuf's copies: the data of a frame stays where gRPC put it.

A frame whose `data` comes last, as clients write it, is cut there. Any other message is parsed whole.
"""

from dataclasses import dataclass

from kvstore_proto.cut import cut
from kvstore_proto.v1 import kvstore_pb2 as pb

_DATA = pb.AppendRequest.FRAME_FIELD_NUMBER, pb.AppendFrame.DATA_FIELD_NUMBER


@dataclass(frozen=True)
class CutFrame:
    """An AppendFrame: `head` without data, and the data."""

    head: pb.AppendFrame
    data: memoryview


def parse_append(message: bytes) -> pb.AppendRequest | CutFrame:
    """DecodeError if the bytes are no AppendRequest."""
    found = cut(message, _DATA)
    if found is None or found[0][0]:
        return pb.AppendRequest.FromString(message)
    return CutFrame(pb.AppendFrame.FromString(found[0][1]), found[1])
