"""Objects as plain files: created once, durable when acknowledged, unharmed by a disk that fails."""

import errno
import os
import threading
from pathlib import Path

import pytest

from kvstore_server.errors import InvalidArgument, ResourceExhausted, Unavailable
from kvstore_server.storage import filesystem
from kvstore_server.storage.filesystem import OsFileSystem
from kvstore_server.storage.local import TEMP_SECONDS_MAX, LocalStore

from .memory_disk import MemoryDisk
from .recording_files import ProcessEnded, RecordingFiles, end_process


@pytest.fixture
def files() -> RecordingFiles:
    return RecordingFiles()


@pytest.fixture
def store(tmp_path: Path, files: RecordingFiles) -> LocalStore:
    store = LocalStore(tmp_path / "data", files=files, fatal=end_process)
    files.calls.clear()
    return store


def temp_files(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path / "data" / ".tmp")


def test_the_first_writer_of_a_name_wins_and_its_bytes_stay(store: LocalStore) -> None:
    assert store.put_if_absent("t/s/x", [b"one ", bytearray(b"two"), memoryview(b" three")])
    assert not store.put_if_absent("t/s/x", [b"other"])
    assert bytes(store.get("t/s/x")) == b"one two three"
    assert store.size("t/s/x") == 13
    assert bytes(store.get_range("t/s/x", 4, 7)) == b"two"
    assert bytes(store.get_range("t/s/x", 8, 100)) == b"three"
    assert bytes(store.get_range("t/s/x", 50, 100)) == b""


def test_what_is_staged_is_synced_and_has_no_name_until_it_is_put(
    store: LocalStore, files: RecordingFiles, tmp_path: Path
) -> None:
    staged = store.stage([b"one ", b"two"])
    assert staged.size == 7
    assert [each for call in files.calls if (each := call.split()[0]) in ("sync", "link")] == ["sync"]
    assert store.list_keys("") == []
    assert staged.put_if_absent("t/s/x")
    assert bytes(store.get("t/s/x")) == b"one two"
    assert not store.stage([b"other"]).put_if_absent("t/s/x")
    store.stage([b"never put"]).discard()
    assert temp_files(tmp_path) == []
    assert store.list_keys("") == ["t/s/x"]


def test_what_is_not_there_is_a_key_error(store: LocalStore) -> None:
    store.put_if_absent("t/s/x", [b"1"])
    for key in ("t/s/y", "u/s/x", "t/s/x/below", "t/s"):
        with pytest.raises(KeyError):
            store.get(key)
    with pytest.raises(KeyError):
        store.size("t/s/y")
    store.delete("t/s/y")
    assert store.list_keys("u") == []
    assert store.list_folders("u") == []


@pytest.mark.parametrize("key", ["", "/", "a//b", "../x", "a/../b", "a/.", ".tmp/x", "a/\0", "a/é", "a\\b", "x" * 161])
def test_keys_that_could_leave_the_folder_are_refused(store: LocalStore, key: str) -> None:
    for call in (store.get, store.size, store.delete):
        with pytest.raises(InvalidArgument):
            call(key)
    with pytest.raises(InvalidArgument):
        store.put_if_absent(key, [b"x"])


def test_lists_are_sorted_recursive_and_start_after_a_key(store: LocalStore, tmp_path: Path) -> None:
    for key in ("t/b/2", "t/a/1", "t/b/1", "u/c/1"):
        store.put_if_absent(key, [b"x"])
    (tmp_path / "data" / "t" / "b" / "left over~").write_bytes(b"")
    assert store.list_keys("t") == ["t/a/1", "t/b/1", "t/b/2"]
    assert store.list_keys("t/b", start_after="t/b/1") == ["t/b/2"]
    assert store.list_keys("t", start_after="t/b/1") == ["t/b/2"]
    assert store.list_keys("") == ["t/a/1", "t/b/1", "t/b/2", "u/c/1"]
    assert store.list_folders("") == ["t", "u"]
    assert store.list_folders("t") == ["a", "b"]


def test_a_deleted_object_is_gone_and_the_others_stay(store: LocalStore) -> None:
    store.put_if_absent("t/x", [b"1"])
    store.put_if_absent("t/y", [b"2"])
    store.delete("t/x")
    assert store.list_keys("t") == ["t/y"]


def test_data_is_synced_before_the_link_and_names_before_the_answer(
    store: LocalStore, files: RecordingFiles, tmp_path: Path
) -> None:
    root = str(tmp_path / "data")
    store.put_if_absent("t/s/x", [b"1"])
    steps = [call.split()[0] for call in files.calls]
    assert steps.index("sync") < steps.index("link") < steps.index("sync_folder")
    assert set(files.synced_folders()) == {f"{root}/t/s", f"{root}/t", root}

    files.calls.clear()
    store.put_if_absent("t/s/y", [b"1"])
    assert files.synced_folders() == [f"{root}/t/s"]


def test_an_object_of_another_process_is_synced_once_before_it_is_served(
    store: LocalStore, files: RecordingFiles, tmp_path: Path
) -> None:
    root = str(tmp_path / "data")
    other = LocalStore(root)
    other.put_if_absent("t/s/x", [b"1"])
    with pytest.raises(KeyError):
        store.get("t/s/y")
    assert files.synced_folders() == []

    store.get("t/s/x")
    assert set(files.synced_folders()) == {f"{root}/t/s", f"{root}/t", root}
    files.calls.clear()
    store.get("t/s/x")
    assert files.synced_folders() == []

    other.put_if_absent("t/s/y", [b"2"])
    store.get_range("t/s/y", 0, 1)
    assert files.synced_folders() == [f"{root}/t/s"]


def test_a_listed_folder_is_synced_once_for_all_its_objects(
    store: LocalStore, files: RecordingFiles, tmp_path: Path
) -> None:
    other = LocalStore(tmp_path / "data")
    for number in range(20):
        other.put_if_absent(f"t/s/{number:02d}", [b"1"])
    for key in store.list_keys("t/s"):
        store.get(key)
    assert files.synced_folders().count(f"{tmp_path}/data/t/s") == 1


@pytest.mark.parametrize("call", ["make_folder", "create", "write", "sync", "close"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failure_before_the_link_leaves_nothing(
    store: LocalStore, files: RecordingFiles, tmp_path: Path, call: str, code: int
) -> None:
    store.put_if_absent("t/s/old", [b"old"])
    files.failing = {call: code}
    error = Unavailable if code == errno.EIO else ResourceExhausted
    with pytest.raises(error) as caught:
        store.put_if_absent("t/s2/new", [b"new data"])
    assert str(tmp_path) not in str(caught.value)
    if isinstance(caught.value, ResourceExhausted):
        assert caught.value.reason == "DISK_FULL"
    assert bytes(store.get("t/s/old")) == b"old"
    files.failing = {}
    assert temp_files(tmp_path) == []
    assert store.list_keys("t") == ["t/s/old"]
    assert store.put_if_absent("t/s2/new", [b"new data"])


def test_a_failed_link_has_an_unknown_outcome_and_a_retry_settles_it(
    store: LocalStore, files: RecordingFiles, tmp_path: Path
) -> None:
    files.failing = {"link": errno.EIO}
    with pytest.raises(Unavailable):
        store.put_if_absent("t/x", [b"1"])
    files.failing = {}
    assert temp_files(tmp_path) == []
    assert store.put_if_absent("t/x", [b"1"])


def test_a_temporary_file_that_cannot_be_removed_does_not_undo_a_commit(
    store: LocalStore, files: RecordingFiles
) -> None:
    files.failing = {"unlink": errno.EIO}
    assert store.put_if_absent("t/x", [b"1"])
    assert bytes(store.get("t/x")) == b"1"


def test_a_failed_sync_of_a_folder_ends_the_process(store: LocalStore, files: RecordingFiles) -> None:
    files.failing = {"sync_folder": errno.EIO}
    with pytest.raises(ProcessEnded):
        store.put_if_absent("t/x", [b"1"])
    with pytest.raises(ProcessEnded):
        store.get("t/x")


def test_a_failed_read_is_unavailable_and_not_a_missing_object(store: LocalStore, files: RecordingFiles) -> None:
    store.put_if_absent("t/x", [b"1"])
    files.failing = {"read": errno.EIO}
    with pytest.raises(Unavailable) as caught:
        store.get("t/x")
    assert caught.value.facts == {"errno": "EIO"}


def test_old_temporary_files_go_at_the_start_and_fresh_ones_stay(tmp_path: Path) -> None:
    LocalStore(tmp_path)
    temp = tmp_path / ".tmp"
    (temp / "old").write_bytes(b"x")
    (temp / "fresh").write_bytes(b"x")
    now = (temp / "fresh").stat().st_mtime
    os.utime(temp / "old", (0.0, now - TEMP_SECONDS_MAX - 1))
    LocalStore(tmp_path, clock=lambda: now)
    assert os.listdir(temp) == ["fresh"]


def test_an_unusable_folder_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable):
        LocalStore(tmp_path / "file" / "data")


def test_many_threads_race_and_one_wins_each_name(store: LocalStore) -> None:
    wins: list[tuple[str, int]] = []

    def write(worker: int) -> None:
        keys = [f"t/race/{number}" for number in range(25)]
        wins.extend((key, worker) for key in keys if store.put_if_absent(key, [bytes([worker]) * 1000]))

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(key for key, _ in wins) == sorted(f"t/race/{number}" for number in range(25))
    for key, worker in wins:
        assert bytes(store.get(key)) == bytes([worker]) * 1000


def test_writes_are_whole_however_little_the_system_takes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev = os.writev
    monkeypatch.setattr(filesystem.os, "writev", lambda handle, parts: writev(handle, [parts[0][:3]]))
    store = LocalStore(tmp_path, reserve=False)
    parts = [b"", b"abcd", b"", b"ef", b"ghijklm"]
    store.put_if_absent("t/x", parts)
    assert bytes(store.get("t/x")) == b"abcdefghijklm"


def test_thousands_of_small_parts_are_one_object(store: LocalStore) -> None:
    store.put_if_absent("t/x", [bytes([n % 256]) for n in range(5000)])
    assert bytes(store.get("t/x")) == bytes(n % 256 for n in range(5000))


def test_what_was_read_stays_when_the_object_goes(store: LocalStore, tmp_path: Path) -> None:
    store.put_if_absent("t/x", [b"kept"])
    data = store.get("t/x")
    with (tmp_path / "data" / "t" / "x").open("r+b") as file:
        file.write(b"lost")
    store.delete("t/x")
    assert bytes(data) == b"kept"


def test_the_probe_leaves_nothing(store: LocalStore) -> None:
    store.probe()
    assert store.list_keys("") == []


class Replacing(OsFileSystem):
    def link(self, source: str, target: str) -> None:
        os.replace(source, target)


class WithoutLinks(OsFileSystem):
    def link(self, source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no links here")


@pytest.mark.parametrize("files", [Replacing(), WithoutLinks()])
def test_the_probe_finds_a_disk_that_cannot_create_exclusively(tmp_path: Path, files: OsFileSystem) -> None:
    with pytest.raises(Unavailable):
        LocalStore(tmp_path, files=files).probe()


def test_the_disk_of_the_crash_tests_acts_like_the_real_one() -> None:
    store = LocalStore("/data", files=MemoryDisk({"/data": None}), fatal=end_process)
    assert store.put_if_absent("t/s/x", [b"one", b"two"])
    assert not store.put_if_absent("t/s/x", [b"other"])
    assert bytes(store.get_range("t/s/x", 2, 4)) == b"et"
    assert store.list_keys("") == ["t/s/x"]
    store.probe()
    for key in ("t/s/y", "t/s", "t/s/x/below"):
        with pytest.raises(KeyError):
            store.get(key)
