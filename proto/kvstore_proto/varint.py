"""The one encoding of protobuf that is needed where messages are put together, or taken apart, by hand."""

_BYTES_MAX = 10


def varint(value: int) -> bytes:
    """A length or a number, at least 0, seven bits a byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; a size that no message has if there is none."""
    value = 0
    for place, byte in enumerate(message[at : at + _BYTES_MAX]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return len(message) + 1, len(message)
