"""The safetensors container: a length, a JSON header, data without holes.

Our files are stricter than the format: data starts at a multiple of 64 bytes (the header is padded with spaces), and
the first four bytes of data are the CRC32C of everything before them, in every version, so that a damaged header is
told from one that a newer version wrote.
"""

import json
import struct
from dataclasses import dataclass

from crc32c import crc32c

ALIGNMENT_BYTES = 64
HEADER_BYTES_MAX = 4 << 20
PREFIX_BYTES = 8
HEADER_CRC_BYTES = 4
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4}


class DamagedError(ValueError):
    """The bytes are not what a writer of this format leaves; the text says what was found."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: bytes [start, end) of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def build_header(metadata: dict[str, str], tensors: tuple[TensorSpec, ...]) -> bytes:
    """Length prefix and padded header; ValueError if it would be longer than HEADER_BYTES_MAX."""
    fields: dict[str, object] = {"__metadata__": metadata}
    for tensor in tensors:
        fields[tensor.name] = _entry(tensor)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % ALIGNMENT_BYTES)
    if len(text) > HEADER_BYTES_MAX:
        raise ValueError(f"a header of {len(text)} bytes is over {HEADER_BYTES_MAX}")
    return struct.pack("<Q", len(text)) + text


def data_offset(head: memoryview) -> int:
    """Where the data starts, from the first bytes of a file; DamagedError before anything is read or allocated."""
    if len(head) < PREFIX_BYTES:
        raise DamagedError(f"{len(head)} bytes are no segment")
    (length,) = struct.unpack_from("<Q", head)
    if not 2 <= length <= HEADER_BYTES_MAX or (PREFIX_BYTES + length) % ALIGNMENT_BYTES:
        raise DamagedError(f"header length {length}")
    return PREFIX_BYTES + length


def parse_header(head: memoryview) -> tuple[dict[str, str], dict[str, object]]:
    """(metadata, tensor entries) of a file whose first bytes, up to and with the header's CRC, are `head`."""
    offset = data_offset(head)
    if len(head) < offset + HEADER_CRC_BYTES:
        raise DamagedError("truncated in the header")
    (expected,) = struct.unpack_from("<I", head, offset)
    if crc32c(head[:offset]) != expected:
        raise DamagedError("header checksum")
    try:
        fields = json.loads(bytes(head[PREFIX_BYTES:offset]), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise DamagedError("header is not JSON") from error
    metadata = fields.pop("__metadata__", None) if isinstance(fields, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedError("header without metadata")
    return metadata, fields


def check_tensors(entries: dict[str, object], tensors: tuple[TensorSpec, ...]) -> None:
    """DamagedError unless the file holds exactly these tensors."""
    if entries != {tensor.name: _entry(tensor) for tensor in tensors}:
        raise DamagedError("the tensors are not those that the metadata describes")


def _entry(tensor: TensorSpec) -> dict[str, object]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [tensor.start, tensor.end]}


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice")
    return fields
