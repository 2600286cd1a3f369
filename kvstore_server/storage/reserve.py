"""Space on the disk that only urgent objects may use, so that a full disk can still be told to delete."""

import contextlib

from kvstore_server.storage.filesystem import FileSystem

FILES = 16
FILE_BYTES = 64 << 10


class Reserve:
    """Small files in a folder of their own, given back to the disk one by one."""

    def __init__(self, files: FileSystem, folder: str) -> None:
        self._files, self._folder = files, folder

    def fill(self) -> None:
        """Makes what is missing, as far as the disk has room."""
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(self._folder)
            for number in range(FILES):
                path = f"{self._folder}/{number:02d}"
                with contextlib.suppress(FileExistsError):
                    self._make(path)

    def release(self) -> bool:
        """Removes one file; False if there was none."""
        try:
            name, _ = min(self._files.names(self._folder))
            self._files.unlink(f"{self._folder}/{name}")
            self._files.sync_folder(self._folder)  # some file systems free the space only then
        except (OSError, ValueError):
            return False
        return True

    def _make(self, path: str) -> None:
        handle = self._files.create(path)
        try:
            self._files.write(handle, [bytes(FILE_BYTES)])
            self._files.sync(handle)
        except OSError:
            self._files.unlink(path)
            raise
        finally:
            self._files.close(handle)
