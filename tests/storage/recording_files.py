"""The real file system, with every call noted and errors where a test wants them."""

import os
from collections.abc import Sequence
from typing import NoReturn

from kvstore_server.storage.filesystem import OsFileSystem
from kvstore_server.storage.store import Buffer


class ProcessEnded(BaseException):
    """Stands for the end of the process."""


def end_process(reason: str) -> NoReturn:
    raise ProcessEnded(reason)


class RecordingFiles(OsFileSystem):
    """Notes every call; those in `failing` raise their errno."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}
        self._paths: dict[int, str] = {}

    def _note(self, call: str, *paths: str) -> None:
        self.calls.append(" ".join([call, *paths]))
        if call in self.failing:
            raise OSError(self.failing[call], os.strerror(self.failing[call]))

    def make_folder(self, path: str) -> None:
        self._note("make_folder", path)
        super().make_folder(path)

    def create(self, path: str) -> int:
        self._note("create", path)
        return super().create(path)

    def write(self, handle: int, parts: Sequence[Buffer]) -> None:
        super().write(handle, [b"".join(parts)[:3]] if "write" in self.failing else parts)
        self._note("write")

    def sync(self, handle: int) -> None:
        self._note("sync")
        super().sync(handle)

    def close(self, handle: int) -> None:
        super().close(handle)
        self._note("close")

    def link(self, source: str, target: str) -> None:
        self._note("link", target)
        super().link(source, target)

    def unlink(self, path: str) -> None:
        self._note("unlink", path)
        super().unlink(path)

    def sync_folder(self, path: str) -> None:
        self._note("sync_folder", path)
        super().sync_folder(path)

    def read(self, path: str, start: int = 0, end: int | None = None) -> memoryview:
        self._note("read", path)
        return super().read(path, start, end)

    def synced_folders(self) -> list[str]:
        return [call.removeprefix("sync_folder ") for call in self.calls if call.startswith("sync_folder ")]
