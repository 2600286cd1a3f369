"""Objects as plain files below one folder."""

import contextlib
import errno
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from kvstore_server.errors import KVStoreError, ResourceExhausted, Unavailable
from kvstore_server.storage.durable_names import DurableNames
from kvstore_server.storage.filesystem import FileSystem, OsFileSystem
from kvstore_server.storage.keys import check_key, is_component
from kvstore_server.storage.probe import FOLDER, prove_create_once
from kvstore_server.storage.reserve import Reserve
from kvstore_server.storage.store import Buffer

TEMP_SECONDS_MAX = 3600.0
"""An older temporary file belongs to a writer that died."""
DISK_FULL_RETRY_SECONDS = 30.0
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


def end_process(reason: str) -> NoReturn:
    """The folder's state on the disk is unknown now, and a second fsync may claim success without having written."""
    logging.getLogger(__name__).critical("%s: the process ends", reason)
    os._exit(os.EX_IOERR)


class LocalStore:
    """An ObjectStore below `root`; several processes may share the folder.

    An object is written to a temporary file, synced, then linked to its name: a rename would overwrite. Folders are
    never removed. A delete is not synced: after a power cut the object may be there again, which is harmless because
    names are never used twice, or not read any more when they are.
    """

    reads_at_once = 1

    def __init__(
        self,
        root: str | Path,
        *,
        files: FileSystem | None = None,
        fatal: Callable[[str], NoReturn] = end_process,
        clock: Callable[[], float] = time.time,
        reserve: bool = True,
    ) -> None:
        self._root = os.path.abspath(root)
        self._temp_folder = f"{self._root}/.tmp"  # hidden, so that no key can name it
        self._files = OsFileSystem() if files is None else files
        self._fatal = fatal
        self._names = DurableNames(self._root, self._sync_folder)
        self._reserve = Reserve(self._files, f"{self._root}/.reserve") if reserve else None
        with _disk_errors():
            self._make_root()
            self._remove_old_temp_files(clock() - TEMP_SECONDS_MAX)
        if self._reserve:
            self._reserve.fill()

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        while True:
            try:
                return self._put(key, parts)
            except ResourceExhausted:
                if not (urgent and self._reserve and self._reserve.release()):
                    raise

    def stage(self, parts: Sequence[Buffer]) -> "StagedFile":
        with _disk_errors():
            return StagedFile(self, self._write_temp(parts), sum(map(len, parts)))

    def get(self, key: str) -> memoryview:
        return self._read(key, 0, None)

    def get_range(self, key: str, start: int, end: int) -> memoryview:
        return self._read(key, start, end)

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        found: list[str] = []
        folders = [prefix]
        while folders:
            folder = folders.pop()
            for name, is_folder in self._list_folder(folder):
                key = f"{folder}/{name}" if folder else name
                if is_folder:
                    folders.append(key)
                elif key > start_after:
                    found.append(key)
        return sorted(found)

    def list_folders(self, prefix: str) -> list[str]:
        return sorted(name for name, is_folder in self._list_folder(prefix) if is_folder)

    def size(self, key: str) -> int:
        path = self._path(key)
        with _disk_errors(), _missing_is_key_error(key):
            size = self._files.size(path)
        self._names.settle(path)
        return size

    def delete(self, key: str) -> None:
        path = self._path(key)
        self._names.forget(path)
        with _disk_errors(), contextlib.suppress(*_MISSING):
            self._files.unlink(path)

    def probe(self) -> None:
        prove_create_once(self)
        key = f"{FOLDER}/{secrets.token_hex(16)}"
        try:
            self.put_if_absent(key, [b"first"])
            replaced = self.stage([b"third"]).put_if_absent(key)  # which does not look before it links
        finally:
            with contextlib.suppress(KVStoreError):
                self.delete(key)
        if replaced:
            raise Unavailable("STORE_UNSAFE", "a link replaces what has the name")

    def _put(self, key: str, parts: Sequence[Buffer]) -> bool:
        return not self._exists(self._path(key)) and self.stage(parts).put_if_absent(key)

    def link(self, temp: str, key: str) -> bool:
        """Gives a synced temporary file its name; False if that is taken. The temporary name is gone after it."""
        path = self._path(key)
        with _disk_errors():
            try:
                self._make_folders(os.path.dirname(path))
                self._files.link(temp, path)
            except FileExistsError:
                return False
            finally:
                self.discard(temp)
        self._names.settle(path)
        return True

    def _read(self, key: str, start: int, end: int | None) -> memoryview:
        path = self._path(key)
        with _disk_errors(), _missing_is_key_error(key):
            data = self._files.read(path, start, end)
        self._names.settle(path)  # only now: a name that is not there yet cannot be durable
        return data

    def _list_folder(self, prefix: str) -> list[tuple[str, bool]]:
        path = self._path(prefix) if prefix else self._root
        with _disk_errors():
            try:
                names = self._files.names(path)
            except _MISSING:
                return []
        names = [entry for entry in names if is_component(entry[0])]
        self._names.note(path, (name for name, _ in names))
        return names

    def _path(self, key: str) -> str:
        check_key(key)
        return f"{self._root}/{key}"

    def _exists(self, path: str) -> bool:
        with _disk_errors():
            try:
                self._files.size(path)
            except _MISSING:
                return False
        return True

    def _make_root(self) -> None:
        missing = []
        path = self._root
        while not self._exists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in [*reversed(missing), self._temp_folder]:
            with contextlib.suppress(FileExistsError):
                self._files.make_folder(path)
        for path in missing:
            self._sync_folder(os.path.dirname(path))
        if not missing:
            # A process that made it may have died before the sync. A mount point's parent may refuse, and need not.
            with contextlib.suppress(OSError):
                self._files.sync_folder(os.path.dirname(self._root))

    def _make_folders(self, folder: str) -> None:
        if self._names.contains_folder(folder):
            return
        self._make_folders(os.path.dirname(folder))
        with contextlib.suppress(FileExistsError):
            self._files.make_folder(folder)

    def _write_temp(self, parts: Sequence[Buffer]) -> str:
        temp = f"{self._temp_folder}/{os.getpid()}-{secrets.token_hex(8)}"
        handle = self._files.create(temp)
        try:
            try:
                self._files.write(handle, parts)
                self._files.sync(handle)
            finally:
                self._files.close(handle)
        except BaseException:
            self.discard(temp)
            raise
        return temp

    def discard(self, temp: str) -> None:
        """Removes a temporary file, if it is there."""
        with contextlib.suppress(OSError):
            self._files.unlink(temp)

    def _sync_folder(self, path: str) -> None:
        try:
            self._files.sync_folder(path)
        except OSError as error:
            self._fatal(f"syncing a folder of the store failed ({errno.errorcode.get(error.errno or 0, 'unknown')})")

    def _remove_old_temp_files(self, before_unix_seconds: float) -> None:
        for name, _ in self._files.names(self._temp_folder):
            path = f"{self._temp_folder}/{name}"
            with contextlib.suppress(OSError):
                if self._files.modified_unix_seconds(path) < before_unix_seconds:
                    self._files.unlink(path)


class StagedFile:
    """A Staged of a LocalStore: a synced temporary file."""

    def __init__(self, store: LocalStore, temp: str, size: int) -> None:
        self._store, self._temp, self.size = store, temp, size

    def put_if_absent(self, key: str) -> bool:
        return self._store.link(self._temp, key)

    def discard(self) -> None:
        self._store.discard(self._temp)


@contextlib.contextmanager
def _missing_is_key_error(key: str) -> Iterator[None]:
    try:
        yield
    except _MISSING:
        raise KeyError(key) from None


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """What the operating system says, in our words; the text holds no path."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceExhausted("DISK_FULL", "the store's disk is full", DISK_FULL_RETRY_SECONDS) from error
        raise Unavailable("IO_ERROR", f"the store's disk answered {name}", errno=name) from error
