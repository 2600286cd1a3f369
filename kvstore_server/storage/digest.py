"""The digest by which a repeated append is told from another one at the same position."""

import hashlib
from collections.abc import Iterable

import xxhash

from kvstore_codecs.spec import Kind
from kvstore_server.storage.store import Buffer


def append_digest(
    shape_fingerprint: str,
    start: int,
    tokens: int,
    encoding: str,
    parts: Iterable[tuple[int, Kind, Iterable[Buffer]]],
) -> str:
    """Hex sha256 over what was sent, independent of framing and device.

    `parts` comes in order (layer 0 keys, layer 0 values, layer 1 keys, ...): the bytes as sent of that layer and kind,
    rows then words then scales, cut into buffers in any way. Each counts by its xxh3_128, big-endian.
    """
    digest = hashlib.sha256(f"kvstore.append {shape_fingerprint} {start} {tokens} {encoding}\n".encode())
    for _, _, buffers in parts:
        layer_kind = xxhash.xxh3_128()
        for buffer in buffers:
            layer_kind.update(buffer)
        digest.update(layer_kind.digest())
    return digest.hexdigest()
