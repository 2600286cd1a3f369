"""Which names of a folder tree would survive a power cut, as far as this process knows."""

import threading
from collections.abc import Callable, Iterable

NAMES_MAX = 1 << 20
"""Beyond it everything is forgotten, which costs nothing but syncing again."""


class DurableNames:
    """A name is durable once its folder was synced after the name was seen, and so for every folder above it.

    Threads may share it: a name counts only after a sync that began when the name was there.
    """

    def __init__(self, root: str, sync_folder: Callable[[str], None]) -> None:
        self._root = root
        self._sync_folder = sync_folder
        self._lock = threading.Lock()
        self._durable: dict[str, set[str]] = {}
        self._seen: dict[str, set[str]] = {}
        self._count = 0

    def note(self, folder: str, names: Iterable[str]) -> None:
        """These names were seen in `folder`: its next sync covers them."""
        with self._lock:
            new = set(names) - self._durable.get(folder, set())
            if new:
                self._make_room(len(new))
                self._seen.setdefault(folder, set()).update(new)

    def contains_folder(self, folder: str) -> bool:
        parent, _, name = folder.rpartition("/")
        with self._lock:
            return folder == self._root or name in self._durable.get(parent, set())

    def settle(self, path: str) -> None:
        """Returns when the existing `path`, and every folder above it up to the root, is durable."""
        folder, _, name = path.rpartition("/")
        with self._lock:
            if name in self._durable.get(folder, set()):
                return
            covered = self._seen.pop(folder, set()) | {name}
        self._sync_folder(folder)
        if folder != self._root:
            self.settle(folder)
        with self._lock:
            self._make_room(len(covered))
            self._durable.setdefault(folder, set()).update(covered)

    def forget(self, path: str) -> None:
        folder, _, name = path.rpartition("/")
        with self._lock:
            self._durable.get(folder, set()).discard(name)
            self._seen.get(folder, set()).discard(name)

    def _make_room(self, count: int) -> None:
        if self._count + count > NAMES_MAX:
            self._durable.clear()
            self._seen.clear()
            self._count = 0
        self._count += count
