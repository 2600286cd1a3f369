"""The offline check names what is damaged, all of it, and nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstore_server.cli import app
from kvstore_server.storage.bucket import BucketStore
from kvstore_server.storage.keys import meta_key
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.merging import MergeBounds, Merger
from kvstore_server.storage.verify import Report, verify_store

from ..faults.tally import TALLY, times
from ..s3_server import S3Server
from .inputs import CLOCK_SECONDS, SHAPE, SPEC, TENANT, append, commit_log, loaded
from .memory_store import CountedStore, MemoryStore
from .records import of_newer_version

A = "default/a/000000000000/log"
B = "default/b/000000000000/log"


@pytest.fixture
def store() -> MemoryStore:
    """a: three appends of 300 tokens; b: a fork of a at 450 and one append; c: deleted and created again."""
    store = MemoryStore()
    log = commit_log(store)
    parent, _ = log.create("a", SHAPE, SPEC)
    for seed in range(3):
        append(log, parent, 300, seed=seed)
    child, _ = log.fork(parent, 450, "b")
    append(log, child, 2, seed=5)
    other, _ = log.create("c", SHAPE, SPEC)
    append(log, other, 2, seed=6)
    log.delete("c")
    log.create("c", SHAPE, SPEC)
    store.put_if_absent("_probe/x", [b"the store's own"])
    return store


def found(store: MemoryStore) -> list[str]:
    return [str(damaged) for damaged in verify_store(store).damaged]


def flip(store: MemoryStore, key: str, place: int) -> None:
    data = bytearray(store.objects[key])
    data[place] ^= 4
    store.objects[key] = bytes(data)


def test_a_whole_store_is_clean_and_counted(store: MemoryStore) -> None:
    seen: list[int] = []

    def progress(report: Report) -> None:
        seen.append(report.sessions)
        assert report.sessions_total == 3

    report = verify_store(store, progress)
    assert report.damaged == []
    assert (report.sessions, report.records, report.segments) == (3, 5, 5)
    assert report.bytes == sum(len(data) for key, data in store.objects.items() if "/log/" in key)
    assert len(seen) == 3 + 5 + 5


def test_an_empty_folder_is_clean(tmp_path: Path) -> None:
    assert verify_store(LocalStore(tmp_path)).damaged == []


def test_a_flipped_bit_anywhere_is_named(store: MemoryStore) -> None:
    source = random.Random(2)
    keys = [key for key in store.objects if "/log/" in key or "/meta/" in key]
    for _ in range(60):
        key = source.choice(keys)
        place = source.randrange(len(store.objects[key]))
        flip(store, key, place)
        session = key.split("/")[1]
        assert any(line.startswith(f"default/{session}") for line in found(store)), (key, place)
        flip(store, key, place)
    assert found(store) == []


def test_a_damaged_page_is_named_with_its_layer_and_kind(store: MemoryStore) -> None:
    flip(store, f"{A}/000000000300.safetensors", -1)
    expected = "default/a generation 000000000000 positions [556, 600) layer 1 values: checksum"
    assert found(store) == [expected]


def test_a_missing_object_is_named_by_all_who_share_it(store: MemoryStore) -> None:
    del store.objects[f"{A}/000000000300.safetensors"]
    key = f"{A}/000000000300.safetensors"
    assert found(store) == [
        f"default/a generation 000000000000 positions [300, 600): missing ({key})",
        f"default/b generation 000000000000 positions [300, 450): missing ({key})",
    ]


DAMAGES: dict[str, Callable[[dict[str, bytes]], object]] = {
    "a damaged header": lambda o: o.update({f"{A}/000000000000.safetensors": b"?" * 500}),
    "a truncated last object": lambda o: o.update({f"{B}/000000000450.safetensors": b""}),
    "a swapped object": lambda o: o.update({f"{A}/000000000000.safetensors": o[f"{A}/000000000300.safetensors"]}),
    "overlapping objects": lambda o: o.update({f"{A}/000000000301.safetensors": o[f"{A}/000000000300.safetensors"]}),
    "damage in a deleted generation": lambda o: o.update({"default/c/000000000000/log/000000000000.safetensors": b"x"}),
    "a record of a newer version": lambda o: o.update({meta_key(TENANT, "a", 1): of_newer_version("a", 1)}),
    "a missing record": lambda o: o.pop(meta_key(TENANT, "c", 1)),
    "a truncated record": lambda o: o.update({meta_key(TENANT, "b", 0): b"{"}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_other_damage_is_named_and_does_not_stop_the_check(store: MemoryStore, name: str) -> None:
    flip(store, f"{B}/000000000450.safetensors", -1)
    before = len(found(store))
    DAMAGES[name](store.objects)
    lines = found(store)
    assert len(lines) > before or name == "a truncated last object"
    assert any("default/b" in line for line in lines)


# ---- in a bucket


@pytest.fixture
def bucket(s3: S3Server) -> tuple[str, MemoryStore]:
    """A session with a merged object, one of its own and a fork, in a bucket: its url and what lies in it."""
    s3.fail("none")
    url = s3.bucket()
    store = CountedStore(BucketStore(url, endpoint=s3.endpoint))
    log = commit_log(store)
    state, _ = log.create("a", SHAPE, SPEC)
    for seed in range(3):
        append(log, state, seed=seed)
    bounds = MergeBounds(objects_min=2, object_bytes_max=1 << 20)
    assert Merger(store, TENANT, bounds, lambda: CLOCK_SECONDS).merge(loaded(log))
    append(log, loaded(log), 2, seed=5)
    log.fork(loaded(log), 2, "b")
    return url, store


def verified(s3: S3Server, url: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", url, "--endpoint", s3.endpoint])
    return result.exit_code, result.output


def test_a_bucket_is_verified_by_its_url(s3: S3Server, bucket: tuple[str, MemoryStore]) -> None:
    url, store = bucket
    code, output = verified(s3, url)
    assert (code, "nothing damaged" in output) == (0, True), output
    for key, session in (("/merged/", "a"), ("/log/000000000003", "a"), ("b/meta/", "b")):
        key = next(each for each in store.objects if key in each)
        flip(store, key, len(store.objects[key]) // 2)
        code, output = verified(s3, url)
        assert (code, f"default/{session}" in output) == (1, True), output
        flip(store, key, len(store.objects[key]) // 2)
    assert verified(s3, url)[0] == 0


def test_every_flipped_byte_of_an_object_in_a_bucket_is_found(bucket: tuple[str, MemoryStore]) -> None:
    """Of a merged one: its header, checksums, rows and words. A sample of the bytes in a plain test run."""
    _, store = bucket
    for other in [each for each in store.objects if "/log/" in each or "/b/" in each]:
        del store.objects[other]
    key = next(each for each in store.objects if "/merged/" in each)
    row = TALLY.row("byte flipped, object in a bucket")
    size = len(store.objects[key])
    for place in range(0, size, times(size // 25, 1)):
        flip(store, key, place)
        row.cycles += 1
        row.operations += 1
        if not any("default/a" in line for line in found(store)):
            row.losses += 1
            raise AssertionError(f"byte {place} of {size}")
        flip(store, key, place)
