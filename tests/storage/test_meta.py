"""Meta records come back as they were written, or not at all."""

import random
from typing import Any

import pytest

from kvstore_server.errors import DataLoss, FailedPrecondition, KVStoreError
from kvstore_server.storage.meta import (
    Ancestor,
    Attributes,
    Checkpoint,
    Create,
    Delete,
    MergedRange,
    Record,
    read_record,
    write_record,
)

from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT
from .records import DELETE, signed

COMMON: dict[str, Any] = {
    "tenant": TENANT,
    "session": "name",
    "seq": 3,
    "writer": "a1",
    "created_unix_seconds": CLOCK_SECONDS,
}


def merged(start: int, end: int) -> MergedRange:
    return MergedRange(start=start, end=end, name="000000000003-a1", digest="ab" * 32, stored_bytes=900)


ANCESTORS = (Ancestor(session="parent", generation="000000000000", end=7),)
RECORDS: list[Record] = [
    Create(**COMMON, spec=SPEC, shape=SHAPE, ttl_seconds=3.5, pinned=True, ancestors=ANCESTORS),
    Create(**COMMON, spec=SPEC, shape=SHAPE, ttl_seconds=None, pinned=False, ancestors=()),
    Attributes(**COMMON, generation="000000000001", ttl_seconds=60, pinned=True),
    DELETE,
    Checkpoint(**COMMON, generation="000000000001", ttl_seconds=60, pinned=False, merged=(merged(0, 4), merged(4, 5))),
]


def read(data: bytes) -> Record:
    return read_record(data, TENANT, "name", 3)


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_comes_back(record: Record) -> None:
    assert read(write_record(record)) == record


@pytest.mark.parametrize("record", RECORDS)
def test_every_flipped_bit_and_every_truncation_is_detected(record: Record) -> None:
    data = bytearray(write_record(record))
    for place in range(len(data)):
        with pytest.raises(DataLoss):
            read(bytes(data[:place]))
        for bit in range(8):
            data[place] ^= 1 << bit
            with pytest.raises(DataLoss):
                read(bytes(data))
            data[place] ^= 1 << bit
    with pytest.raises(DataLoss):
        read(bytes(data) + b" ")


@pytest.mark.parametrize("place", [("other", "name", 3), (TENANT, "other", 3), (TENANT, "name", 4)])
def test_the_record_of_another_name_is_refused(place: tuple[str, str, int]) -> None:
    with pytest.raises(DataLoss):
        read_record(write_record(RECORDS[0]), *place)


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "checkpoint"},
        {"type": "something new"},
        {"min_reader": 3},
        {"min_reader": None},
        {"more": 1},
        {"generation": 1},
        {"type": ["delete"]},
    ],
)
def test_what_a_newer_version_wrote_is_refused_as_such(fields: dict[str, Any]) -> None:
    with pytest.raises(FailedPrecondition):
        read(signed(**fields))


def test_a_higher_version_that_this_reader_may_read_is_read() -> None:
    assert isinstance(read(signed(version=7)), Delete)


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b"[" * 100_000, b"\xff", b'{"crc32c":NaN}', b"1" * 5000, b" " * (2 << 20)]
)
def test_what_is_no_record_is_data_loss(data: bytes) -> None:
    with pytest.raises(DataLoss):
        read(data)


def test_random_damage_only_raises_our_errors() -> None:
    source = random.Random(5)
    data = write_record(RECORDS[0])
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(source.randrange(1, 5)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        if bytes(changed) != data:
            with pytest.raises(KVStoreError):
                read(bytes(changed))


@pytest.mark.parametrize("ranges", [[], [(0, 0)], [(0, 4), (3, 5)], [(4, 6), (0, 2)]])
def test_a_checkpoint_whose_ranges_are_empty_or_overlap_is_refused(ranges: list[tuple[int, int]]) -> None:
    fields = {"type": "checkpoint", "ttl_seconds": None, "pinned": False, "min_reader": 2, "version": 2}
    with pytest.raises(FailedPrecondition):
        read(signed(**fields, merged=[merged(*each).model_dump(mode="json") for each in ranges]))
    read(signed(**fields, merged=[merged(0, 2).model_dump(mode="json")]))
