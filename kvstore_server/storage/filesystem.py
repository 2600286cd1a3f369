"""The operating system as the store sees it: one seam, so that a test can record it, crash it or make it fail."""

import os
import stat
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvstore_server.storage.store import Buffer

PARTS_PER_WRITE_MAX = 1024
"""IOV_MAX of Linux."""


class FileSystem(Protocol):
    """Blocking calls on whole paths; each failure is an OSError."""

    def make_folder(self, path: str) -> None:
        """FileExistsError if the name is taken."""
        ...

    def create(self, path: str) -> int:
        """A handle that writes to a new file; FileExistsError if the name is taken."""
        ...

    def write(self, handle: int, parts: Sequence[Buffer]) -> None:
        """Appends all parts."""
        ...

    def sync(self, handle: int) -> None:
        """What was written survives a power cut; its name need not."""
        ...

    def close(self, handle: int) -> None: ...

    def link(self, source: str, target: str) -> None:
        """Gives the file a second name; FileExistsError, changing nothing, if that is taken."""
        ...

    def unlink(self, path: str) -> None: ...

    def sync_folder(self, path: str) -> None:
        """The names in it survive a power cut."""
        ...

    def read(self, path: str, start: int = 0, end: int | None = None) -> memoryview:
        """Bytes [start, end) in memory of their own, shorter at the end of the file."""
        ...

    def size(self, path: str) -> int: ...

    def modified_unix_seconds(self, path: str) -> float: ...

    def names(self, path: str) -> list[tuple[str, bool]]:
        """What lies in a folder: (name, is a folder), in no order."""
        ...


class OsFileSystem:
    """The real one.

    `read` copies instead of mapping the file, although mapping is four times faster at 64 MiB: the bytes that were
    checked must be the bytes that are used, and a bad sector or a file that is cut under us must not kill the process.
    """

    def make_folder(self, path: str) -> None:
        os.mkdir(path, 0o700)

    def create(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, handle: int, parts: Sequence[Buffer]) -> None:
        pending = [memoryview(part).cast("B") for part in parts if len(part)]
        first = 0
        while first < len(pending):
            written = os.writev(handle, pending[first : first + PARTS_PER_WRITE_MAX])
            while first < len(pending) and written >= len(pending[first]):
                written -= len(pending[first])
                first += 1
            if written:
                pending[first] = pending[first][written:]

    def sync(self, handle: int) -> None:
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_folder(self, path: str) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, path: str, start: int = 0, end: int | None = None) -> memoryview:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(path)
            size = status.st_size
            stop = size if end is None else min(end, size)
            buffer = np.empty(max(stop - start, 0), np.uint8).data
            filled = 0
            while filled < len(buffer):
                count = os.preadv(handle, [buffer[filled:]], start + filled)
                if not count:
                    break
                filled += count
            return buffer[:filled]
        finally:
            os.close(handle)

    def size(self, path: str) -> int:
        return os.stat(path).st_size

    def modified_unix_seconds(self, path: str) -> float:
        return os.stat(path).st_mtime

    def names(self, path: str) -> list[tuple[str, bool]]:
        with os.scandir(path) as entries:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
