"""docs/format.md is the format: its worked examples are parsed and written again, byte for byte."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvstore_codecs.sketch import KindRows
from kvstore_codecs.spec import KINDS, Kind
from kvstore_kernels.types import Signs
from kvstore_server.storage.container import HEADER_BYTES_MAX
from kvstore_server.storage.digest import append_digest
from kvstore_server.storage.geometry import PAGE_TOKENS
from kvstore_server.storage.merged_segment import merged_segment
from kvstore_server.storage.meta import (
    ANCESTORS_MAX,
    MERGED_MAX,
    RECORD_BYTES_MAX,
    Attributes,
    Checkpoint,
    read_record,
    write_record,
)
from kvstore_server.storage.segment import Segment, geometry_of, read_segment, write_segment
from kvstore_server.storage.segment_header import Identity, SegmentHeader, to_metadata
from kvstore_server.storage.store import Buffer

from .inputs import object_bytes

DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
HEX_LINE = re.compile(r"^([0-9a-f]{4})  ((?:[0-9a-f]{2} ?){1,16}) *(?: .*)?$", re.MULTILINE)
SHAPE_FINGERPRINT = "5a" * 32


def fenced(language: str) -> str:
    match = re.search(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    assert match
    return match[1]


def example() -> Segment:
    """The append of the document: two tokens, the first exact, keys as signs and values dense."""
    key_rows = torch.full((1, 1, 32), 1.0, dtype=torch.float16)
    words = torch.tensor([[0x80000003 - (1 << 32)]], dtype=torch.int32)
    keys = KindRows(key_rows, Signs(words, torch.tensor([[0.25]], dtype=torch.float16)))
    values = KindRows(torch.tensor([0.5, -2.0]).half().reshape(2, 1, 1).expand(2, 1, 32), None)
    sent = torch.tensor([1.0, 0.125]).half().reshape(2, 1).expand(2, 32), values.rows
    parts: list[tuple[int, Kind, list[Buffer]]] = [
        (0, kind, [rows.contiguous().numpy().tobytes()]) for kind, rows in zip(KINDS, sent, strict=True)
    ]
    header = SegmentHeader(
        identity=Identity("default", "novel", "000000000003", 0),
        geometry=geometry_of(2, 1, "float16", (keys,), (values,), None),
        previous=None,
        previous_digest="",
        digest=append_digest(SHAPE_FINGERPRINT, 0, 2, "raw", parts),
        encoding="raw",
        encoded_by="server",
        codec_fingerprint="c0" * 32,
        shape_fingerprint=SHAPE_FINGERPRINT,
        fit_range=None,
        block_hashes=(),
        created_unix_seconds=1790000000.5,
    )
    return Segment(header, (keys,), (values,), None)


def _bytes(lines: list[tuple[str, str]]) -> bytes:
    first = int(lines[0][0], 16)
    assert [int(at, 16) for at, _ in lines] == list(range(first, first + 16 * len(lines), 16))
    return b"".join(bytes.fromhex(text) for _, text in lines)


def dumped(data: bytes) -> str:
    return "\n".join(f"{at:04x}  {data[at : at + 16].hex(' ')}" for at in range(0, len(data), 16))


def test_the_segment_of_the_document_is_what_is_written_and_read() -> None:
    prefix, data = (HEX_LINE.findall(fenced(block)) for block in ("prefix", "data"))
    header = fenced("header").replace("\n", "").encode()
    spaces = re.search(r"and (\d+) spaces", DOCUMENT)
    assert spaces
    data = _bytes(prefix) + header + b" " * int(spaces[1]) + _bytes(data)
    source = example()
    expected = object_bytes(write_segment(source))
    assert data == expected, f"docs/format.md should hold\n{dumped(expected)}"
    read = read_segment(data, source.header.identity)
    assert read.header == source.header
    signs = read.keys[0].signs
    assert signs
    assert (signs.words.tolist(), signs.scales.tolist()) == ([[0x80000003 - (1 << 32)]], [[0.25]])
    assert read.values[0].rows[:, 0, 0].tolist() == [0.5, -2.0]


def test_the_record_of_the_document_is_what_is_written_and_read() -> None:
    text = fenced("json").strip().encode()
    record = read_record(text, "default", "novel", 4)
    assert record == Attributes(
        tenant="default",
        session="novel",
        seq=4,
        writer="6f1c88d0a3b24e59b7c0d1e2f3a4b5c6",
        created_unix_seconds=1790000001.25,
        generation="000000000003",
        ttl_seconds=3600.0,
        pinned=False,
    )
    assert write_record(record) == text


def test_the_checkpoint_of_the_document_is_what_is_written_and_read() -> None:
    text = fenced("checkpoint").strip().encode()
    record = read_record(text, "default", "novel", 5)
    assert isinstance(record, Checkpoint)
    assert write_record(record) == text
    first = example()
    identity = replace(first.header.identity, start=2)
    second = replace(first, header=replace(first.header, identity=identity, digest="c1" * 32))
    merged = merged_segment([first, second], 0.0).header
    assert [(r.start, r.end, r.digest) for r in record.merged] == [(merged.start, merged.end, merged.digest)]
    row = json.loads(to_metadata(merged)["appends"])[0]
    assert row == [2, first.header.digest, "raw", "server", 1790000000.5, 0, []]


@pytest.mark.parametrize(
    "statement",
    [
        f"at most {HEADER_BYTES_MAX:,} bytes",
        f"at most {RECORD_BYTES_MAX:,} bytes",
        f"at most {ANCESTORS_MAX} ancestors",
        f"1 to {MERGED_MAX:,} ranges",
        f"page is {PAGE_TOKENS} tokens",
    ],
)
def test_the_documents_limits_are_the_codes(statement: str) -> None:
    assert statement in " ".join(DOCUMENT.split())
