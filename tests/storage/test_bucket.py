"""Objects in a bucket of a real S3 server: created once, read in pieces, patient with a server that fails."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore_server.config import ConfigError, Storage
from kvstore_server.errors import InvalidArgument, Unavailable
from kvstore_server.storage import bucket, opening
from kvstore_server.storage.bucket import BucketStore

from ..s3_server import HANG_SECONDS, Fault, S3Server
from .inputs import append, commit_log, created, loaded

RETRY_SECONDS = 2.0
REQUEST_SECONDS = 1.0


@pytest.fixture
def store(s3: S3Server) -> BucketStore:
    s3.fail("none")
    return BucketStore(f"{s3.bucket()}/below/here", endpoint=s3.endpoint)


@pytest.fixture
def hasty(s3: S3Server) -> BucketStore:
    """Gives up soon."""
    s3.fail("none")
    return BucketStore(s3.bucket(), endpoint=s3.endpoint, request_seconds=REQUEST_SECONDS, retry_seconds=RETRY_SECONDS)


def test_the_first_writer_of_a_name_wins_and_its_bytes_stay(store: BucketStore) -> None:
    assert store.put_if_absent("t/s/x", [b"one ", bytearray(b"two"), memoryview(b" three")])
    assert not store.put_if_absent("t/s/x", [b"other"])
    assert bytes(store.get("t/s/x")) == b"one two three"
    assert store.size("t/s/x") == 13
    assert bytes(store.get_range("t/s/x", 4, 7)) == b"two"
    assert bytes(store.get_range("t/s/x", 8, 100)) == b"three"
    assert bytes(store.get_range("t/s/x", 50, 100)) == b""


def test_what_is_not_there_is_a_key_error(store: BucketStore) -> None:
    for call in (store.get, store.size, lambda key: store.get_range(key, 0, 5)):
        with pytest.raises(KeyError):
            call("t/s/y")
    store.delete("t/s/y")
    assert store.list_keys("u") == []
    assert store.list_folders("u") == []


def test_an_empty_object_is_one(store: BucketStore) -> None:
    assert store.put_if_absent("t/refs/b", [b""])
    assert (bytes(store.get("t/refs/b")), store.size("t/refs/b")) == (b"", 0)
    assert store.list_keys("t") == ["t/refs/b"]


@pytest.mark.parametrize("key", ["", "/", "a//b", "../x", "a/../b", ".tmp/x", "a/\0", "a/é"])
def test_keys_that_are_not_allowed_reach_no_bucket(store: BucketStore, key: str) -> None:
    for call in (store.get, store.size, store.delete):
        with pytest.raises(InvalidArgument):
            call(key)


def test_lists_are_sorted_recursive_and_start_after_a_key(store: BucketStore) -> None:
    for key in ("t/b/2", "t/a/1", "t/b/1", "t/bb/1", "u/c/1"):
        store.put_if_absent(key, [b"x"])
    assert store.list_keys("t") == ["t/a/1", "t/b/1", "t/b/2", "t/bb/1"]
    assert store.list_keys("t/b", start_after="t/b/1") == ["t/b/2"]
    assert store.list_folders("") == ["t", "u"]
    assert store.list_folders("t") == ["a", "b", "bb"]


def test_a_list_of_more_than_a_page_is_whole(store: BucketStore) -> None:
    keys = [f"t/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as writers:
        assert all(writers.map(lambda key: store.put_if_absent(key, [b""]), keys))
    assert store.list_keys("t") == keys


def test_a_large_object_is_read_in_pieces(store: BucketStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART_BYTES", 1000)
    for size in (999, 1000, 1001, 12_345):
        data = random.Random(size).randbytes(size)
        store.put_if_absent(f"t/{size}", [data[:7], data[7:]])
        assert bytes(store.get(f"t/{size}")) == data


def test_many_threads_race_and_one_wins_each_name(store: BucketStore) -> None:
    wins: list[tuple[str, int]] = []

    def write(worker: int) -> None:
        keys = [f"t/race/{number}" for number in range(25)]
        wins.extend((key, worker) for key in keys if store.put_if_absent(key, [bytes([worker]) * 1000]))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(key for key, _ in wins) == sorted(f"t/race/{number}" for number in range(25))
    for key, worker in wins:
        assert bytes(store.get(key)) == bytes([worker]) * 1000


def test_a_request_that_fails_is_tried_again(hasty: BucketStore, s3: S3Server) -> None:
    s3.fail("refuse", 2)
    assert hasty.put_if_absent("t/x", [b"1"])
    s3.fail("hang", 1)
    assert bytes(hasty.get("t/x")) == b"1"


def test_a_create_whose_answer_is_lost_says_that_the_name_is_taken(store: BucketStore, s3: S3Server) -> None:
    s3.fail("lose", 1)
    assert not store.put_if_absent("t/x", [b"1"])
    assert bytes(store.get("t/x")) == b"1"


@pytest.mark.parametrize("fault", ["refuse", "hang"])
def test_a_store_that_does_not_recover_is_unavailable_in_time(hasty: BucketStore, s3: S3Server, fault: Fault) -> None:
    hasty.put_if_absent("t/x", [b"1"])
    s3.fail(fault)
    for call in (lambda: hasty.put_if_absent("t/y", [b"1"]), lambda: hasty.get("t/x"), lambda: hasty.list_keys("t")):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            call()
        assert time.monotonic() - began < RETRY_SECONDS + 2 * REQUEST_SECONDS + HANG_SECONDS


def test_a_dead_endpoint_is_unavailable_in_time() -> None:
    store = BucketStore("s3://nobody", endpoint="http://127.0.0.1:9", request_seconds=1, retry_seconds=0.3)
    with pytest.raises(Unavailable):
        store.get("t/x")
    with pytest.raises(Unavailable):
        store.put_if_absent("t/x", [b"1"])


def test_every_answer_may_be_lost_and_each_append_is_there_once(store: BucketStore, s3: S3Server) -> None:
    log = commit_log(store)
    s3.fail("lose", 1)
    state = created(log)
    for seed in range(5):
        s3.fail("lose", 1)
        append(log, state, 2, seed=seed)
    s3.fail("none")
    assert [entry.end for entry in log.appends(loaded(commit_log(store)))] == [2, 4, 6, 8, 10]


def test_the_probe_leaves_nothing(store: BucketStore) -> None:
    store.probe()
    assert store.list_keys("") == []


@pytest.mark.parametrize("fault", ["overwrite", "unlisted"])
def test_the_probe_finds_a_store_that_would_lose_appends(store: BucketStore, s3: S3Server, fault: Fault) -> None:
    s3.fail(fault)
    with pytest.raises(Unavailable) as caught:
        store.probe()
    assert caught.value.reason == "STORE_UNSAFE"


class Careless(BucketStore):
    """Looks before it creates, as a store would that has no conditional create: right alone, wrong in company."""

    def put_if_absent(self, key: str, parts: object, *, urgent: bool = False) -> bool:
        if self._exists(key):
            return False
        time.sleep(0.05)
        self._store.put(key, b"".join(parts))  # type: ignore[arg-type]
        return True


def test_the_probe_finds_a_store_that_only_looks_first(s3: S3Server) -> None:
    s3.fail("none")
    with pytest.raises(Unavailable) as caught:
        Careless(s3.bucket(), endpoint=s3.endpoint).probe()
    assert caught.value.reason == "STORE_UNSAFE"


def test_a_bucket_without_its_library_is_said_by_the_name_of_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "kvstore_server.storage.bucket", None)
    with pytest.raises(ConfigError, match=r"storage.url: .* needs the extra `s3`"):
        opening.open_store(Storage(url="s3://bucket"))
