"""Steps known by their bytes: those of a stream mostly differ in their number and in q alone, and only that is read."""

from typing import Generic, TypeVar

from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.varint import read_varint

T = TypeVar("T")
_STEP = pb.AttendRequest.STEP_FIELD_NUMBER << 3 | 2
_ID = pb.AttendStep.REQUEST_ID_FIELD_NUMBER << 3
_SHORTEST_BYTES = 32
"""Beyond the two numbers that a step begins with."""
_TO_Q = [field.name for field in pb.AttendStep.DESCRIPTOR.fields if field.number <= pb.AttendStep.Q_FIELD_NUMBER]
_KNOWN_MAX = 1024
"""Kinds of steps that a stream remembers: a few for each layer of each session."""


class Repeats(Generic[T]):
    """What is kept of steps, found by the bytes around their number and the data of q."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, bytes], T] = {}
        self._data_bytes = self._tail_bytes = 0
        """Of the step kept last, by which others are cut; one that is longer elsewhere is not found."""

    def find(self, message: bytes) -> tuple[int, bytes, T] | None:
        """The step's number, q's data, and what was kept of one like it; None for all other messages."""
        begun = _begun(message)
        if begun is None:
            return None
        request_id, begin = begun
        end = len(message) - self._tail_bytes
        data = end - self._data_bytes
        known = self._known.get((message[begin:data], message[end:]))
        return None if known is None else (request_id, message[data:end], known)

    def keep(self, message: bytes, what: T) -> None:
        """For steps like this one, if it is written as protobuf writes it and without fields that are not known."""
        request = pb.AttendRequest.FromString(message)
        request.DiscardUnknownFields()
        begun = _begun(message)
        if begun is None or request.SerializeToString() != message:
            return
        self._data_bytes = len(request.step.q.data)
        for field in _TO_Q:
            request.step.ClearField(field)  # pyright: ignore[reportArgumentType]
        self._tail_bytes = request.step.ByteSize()
        end = len(message) - self._tail_bytes
        while len(self._known) >= _KNOWN_MAX:
            del self._known[next(iter(self._known))]
        self._known[message[begun[1] : end - self._data_bytes], message[end:]] = what

    def clear(self) -> None:
        self._known.clear()


def _begun(message: bytes) -> tuple[int, int] | None:
    """The number of a step, and where its other fields begin."""
    if len(message) < _SHORTEST_BYTES or message[0] != _STEP:
        return None
    size, begin = read_varint(message, 1)
    if begin + size != len(message) or message[begin] != _ID:
        return None
    request_id, begin = read_varint(message, begin + 1)
    return None if request_id >> 64 else (request_id, begin)
