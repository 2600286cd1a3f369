"""Messages that end in much data, read without protobuf's copies: the data stays where gRPC put it.

protobuf copies a `bytes` field when it parses and again when it is read. Where such a field comes last, in a message
that comes last in another, both sides cut it off and have protobuf parse what is before it.
"""

from collections.abc import Sequence

from kvstore_proto.varint import read_varint

VARINT, DELIMITED = 0, 2


def cut(message: bytes, path: Sequence[int]) -> tuple[list[bytes], memoryview] | None:
    """What comes before field `path[i]` in the message that `path[:i]` leads to, for each i; the bytes of the last one.

    None unless each of these fields is the first of its number and goes on to the end of the whole message.
    """
    heads, begin = list[bytes](), 0
    for number in path:
        found = _find(message, begin, number)
        if found is None:
            return None
        at, inner = found
        heads.append(message[begin:at])
        begin = inner
    return heads, memoryview(message)[begin:]


def _find(message: bytes, at: int, number: int) -> tuple[int, int] | None:
    """Where that field begins, and where its bytes do."""
    while at < len(message):
        key, value = read_varint(message, at)
        size, after = read_varint(message, value)
        if key == number << 3 | DELIMITED:
            return (at, after) if after + size == len(message) else None
        if key & 7 not in (VARINT, DELIMITED):
            return None
        at = after if key & 7 == VARINT else after + size
    return None
