"""On a full disk appends are refused, reads and deletes go on, and nothing is lost."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvstore_server.errors import ResourceExhausted
from kvstore_server.storage.filesystem import OsFileSystem
from kvstore_server.storage.local import LocalStore
from kvstore_server.storage.reserve import FILE_BYTES, FILES
from kvstore_server.storage.store import Buffer

from .inputs import SHAPE, SPEC, append, commit_log, next_segment


class SmallDisk(OsFileSystem):
    """Holds so many bytes of files; a write that goes beyond is cut off, as a real one is."""

    def __init__(self, root: Path, bytes_max: int) -> None:
        self.root, self.bytes_max = root, bytes_max

    def used(self) -> int:
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def write(self, handle: int, parts: Sequence[Buffer]) -> None:
        left = self.bytes_max - self.used()
        data = b"".join(parts)
        super().write(handle, [data[: max(left, 0)]])
        if len(data) > left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_refuses_appends_and_nothing_else(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, FILES * FILE_BYTES + 40_000)
    log = commit_log(LocalStore(tmp_path, files=disk))
    state, _ = log.create("a", SHAPE, SPEC)
    log.create("b", SHAPE, SPEC)
    digests: list[str] = []

    def fill() -> None:
        for seed in range(1000):
            segment = next_segment(log, state, 30, seed=seed)
            log.commit(state, segment)
            digests.append(segment.header.digest)

    with pytest.raises(ResourceExhausted) as caught:
        fill()
    assert caught.value.reason == "DISK_FULL"
    assert caught.value.retry_after_seconds > 0
    assert len(digests) > 3

    reopened = commit_log(LocalStore(tmp_path, files=disk))
    found = reopened.load("a")
    assert found
    assert [reopened.read(found, entry).header.digest for entry in reopened.appends(found)] == digests
    for _ in range(5):
        with pytest.raises(ResourceExhausted):
            append(reopened, found, 30)

    disk.bytes_max = disk.used()
    with pytest.raises(ResourceExhausted):
        reopened.update(found, ttl_seconds=1.0, pinned=False)
    assert reopened.delete("b")
    assert reopened.delete("a")

    disk.bytes_max += 100_000
    again, _ = reopened.create("a", SHAPE, SPEC)
    append(reopened, again, 30)


def test_a_reserve_that_is_used_up_says_so_and_is_refilled_at_the_next_start(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path, FILES * FILE_BYTES)
    store = LocalStore(tmp_path, files=disk)
    for number in range(FILES):
        assert store.put_if_absent(f"t/{number}", [bytes(FILE_BYTES)], urgent=True)
    with pytest.raises(ResourceExhausted):
        store.put_if_absent("t/more", [bytes(FILE_BYTES)], urgent=True)
    disk.bytes_max *= 3
    LocalStore(tmp_path, files=disk)
    assert len(os.listdir(tmp_path / ".reserve")) == FILES


def test_a_disk_without_room_for_a_reserve_can_still_be_opened(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, files=SmallDisk(tmp_path, 10))
    assert store.put_if_absent("t/x", [b"1"])
    assert store.list_keys("") == ["t/x"]
