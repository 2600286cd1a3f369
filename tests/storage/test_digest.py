"""The digest of an append depends on what was sent, not on how."""

import hashlib

import pytest
import xxhash

from kvstore_codecs.spec import Kind
from kvstore_server.storage.digest import append_digest
from kvstore_server.storage.store import Buffer

Parts = list[tuple[int, Kind, list[Buffer]]]
WHOLE: Parts = [(0, "keys", [b"rows of keys"]), (0, "values", [b"rows of values"])]
CUT: Parts = [(0, "keys", [b"rows ", b"", bytearray(b"of keys")]), (0, "values", [memoryview(b"rows of values")])]
SHIFTED: Parts = [(0, "keys", [b"rows of keysrows"]), (0, "values", [b" of values"])]


def test_framing_does_not_matter() -> None:
    assert append_digest("shape", 0, 1, "raw", WHOLE) == append_digest("shape", 0, 1, "raw", CUT)


@pytest.mark.parametrize(
    "other",
    [
        append_digest("shape2", 0, 1, "raw", WHOLE),
        append_digest("shape", 1, 1, "raw", WHOLE),
        append_digest("shape", 0, 2, "raw", WHOLE),
        append_digest("shape", 0, 1, "sketch", WHOLE),
        append_digest("shape", 0, 1, "raw", WHOLE[::-1]),
        append_digest("shape", 0, 1, "raw", SHIFTED),
        append_digest("shape", 0, 1, "raw", WHOLE[:1]),
    ],
)
def test_everything_else_does(other: str) -> None:
    assert other != append_digest("shape", 0, 1, "raw", WHOLE)


def test_it_is_what_the_document_says() -> None:
    parts = b"".join(xxhash.xxh3_128(data[0]).digest() for *_, data in WHOLE)
    expected = hashlib.sha256(b"kvstore.append shape 7 2 raw\n" + parts).hexdigest()
    assert append_digest("shape", 7, 2, "raw", WHOLE) == expected
