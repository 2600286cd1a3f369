"""Append messages without protobuf's copies: the data of a frame stays where gRPC put it.

protobuf copies a `bytes` field when it parses and again when it is read. A frame whose `data` comes last, as clients
write it, is cut there instead: what is before is parsed as a frame without data. Any other message is parsed whole.
"""

from dataclasses import dataclass

from kvstore_proto.v1 import kvstore_pb2 as pb

_FRAME_TAG = pb.AppendRequest.FRAME_FIELD_NUMBER << 3 | 2
_DATA_TAG = pb.AppendFrame.DATA_FIELD_NUMBER << 3 | 2
_VARINT_BYTES_MAX = 10


@dataclass(frozen=True)
class CutFrame:
    """An AppendFrame: `head` without data, and the data."""

    head: pb.AppendFrame
    data: memoryview


def parse_append(message: bytes) -> pb.AppendRequest | CutFrame:
    """DecodeError if the bytes are no AppendRequest."""
    cut = _cut(message)
    if cut is None:
        return pb.AppendRequest.FromString(message)
    begin, end, data = cut
    return CutFrame(pb.AppendFrame.FromString(message[begin:end]), memoryview(message)[data:])


def _cut(message: bytes) -> tuple[int, int, int] | None:
    """Where the frame's other fields begin and end, and where its data begins, if that goes on to the end."""
    if len(message) < 2 or message[0] != _FRAME_TAG:
        return None
    size, begin = _varint(message, 1)
    if begin + size != len(message):
        return None
    at = begin
    while at < len(message):
        tag, value = message[at], at + 1
        if tag == _DATA_TAG:
            size, data = _varint(message, value)
            return (begin, at, data) if data + size == len(message) else None
        if tag & 0x87:  # neither a varint nor a field below 16
            return None
        _, at = _varint(message, value)
    return None


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; a size that no message has if there is none."""
    value = 0
    for place, byte in enumerate(message[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return len(message) + 1, len(message)
