"""A mounted file system that can lose its power: programs see all that they wrote, the disk has only what was synced.

Run as `python -m tests.faults.powercut_fs FOLDER [files|folders]`. It mounts itself on the folder; each line `SEED DATA
NAMES` on its standard input is a power cut (MemoryDisk.power_cut), answered by a line when it is over. With `files` or
`folders` the syncs of these do nothing: the planted bug. Nothing may have a file open at a power cut.
"""

import errno
import random
import stat
import sys
import threading
from contextlib import suppress
from typing import Any

import mfusepy

from ..storage.memory_disk import File, Folder, MemoryDisk


class PowerCutFS(mfusepy.Operations):
    """MemoryDisk behind the kernel: what the store calls, and not more. One thread calls it, another cuts the power."""

    use_ns = True
    """Of mfusepy: how it would give times, had they any."""

    def __init__(self, deaf: str) -> None:
        self._disk = MemoryDisk()
        self._deaf = deaf

    def cut_power(self, seed: int, data: str, names: str) -> None:
        self._disk = MemoryDisk(self._disk.power_cut(random.Random(seed), data=data, names=names))

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = self._disk.at.get(path)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, path)
        mode = stat.S_IFDIR | 0o700 if isinstance(found, Folder) else stat.S_IFREG | 0o600
        return {"st_mode": mode, "st_nlink": 1, "st_size": self._disk.size(path)}

    def readdir(self, path: str, fh: int) -> Any:
        return [".", "..", *(name for name, _ in self._disk.names(path.rstrip("/")))]

    def mkdir(self, path: str, mode: int) -> int:
        self._disk.make_folder(path)
        return 0

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return self._disk.create(path)

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return bytes(self._disk.read(path, offset, offset + size))

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        if offset != self._disk.size(path):
            raise OSError(errno.ENOSYS, "only appends")
        self._disk.write(fh, [data])
        return len(data)

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        if self._deaf != "files":
            self._disk.sync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        if self._deaf != "folders":
            self._disk.sync_folder(path.rstrip("/"))
        return 0

    def release(self, path: str, fh: int) -> int:
        with suppress(KeyError):  # of a file opened to be read, or before a power cut
            self._disk.close(fh)
        return 0

    def link(self, target: str, source: str) -> int:
        assert isinstance(self._disk.at[source], File)
        self._disk.link(source, target)
        return 0

    def unlink(self, path: str) -> int:
        self._disk.unlink(path)
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        return {"f_bsize": 4096, "f_frsize": 4096, "f_blocks": 1 << 20, "f_bfree": 1 << 20, "f_bavail": 1 << 20}


def main(folder: str, deaf: str = "") -> None:
    files = PowerCutFS(deaf)

    def obey() -> None:
        for line in sys.stdin:
            seed, data, names = line.split()
            files.cut_power(int(seed), data, names)
            print("cut", flush=True)

    threading.Thread(target=obey, daemon=True).start()
    # The kernel keeps nothing: it could not know of a power cut.
    uncached = {"direct_io": True, "attr_timeout": 0, "entry_timeout": 0, "negative_timeout": 0, "hard_remove": True}
    mfusepy.FUSE(files, folder, foreground=True, nothreads=True, **uncached)


if __name__ == "__main__":
    main(*sys.argv[1:])
