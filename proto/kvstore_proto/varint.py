"""The one encoding of protobuf that is needed where messages are put together by hand."""


def varint(value: int) -> bytes:
    """A length or a number, at least 0, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
