"""A disk in memory that knows what was synced, and what a power cut may leave of the rest."""

import errno
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from kvstore_server.storage.store import Buffer

Tree = dict[str, bytes | None]
"""What a power cut leaves: whole path to content, None for a folder."""


@dataclass
class File:
    data: bytes = b""
    synced: bytes = b""


@dataclass
class Folder:
    names: "dict[str, Node]" = field(default_factory=dict)
    synced: "dict[str, Node]" = field(default_factory=dict)


Node = File | Folder


class MemoryDisk:
    """A FileSystem. Calls `changed` after everything that changes it; sync number `lost_sync` does nothing."""

    def __init__(self, tree: Tree | None = None, lost_sync: int | None = None) -> None:
        self.root = Folder()
        self.at: dict[str, Node] = {"/": self.root, "": self.root}
        """Whole path to what is there now."""
        self.lost = False
        """Whether the lost sync had anything to do but to forget what was removed."""
        self.deaf_folder: str | None = None
        """Its syncs do nothing."""
        self.changed: Callable[[str], None] = lambda call: None
        self.syncs = 0
        self._lost_sync = lost_sync
        self._handles: dict[int, File] = {}
        self._handle_numbers = count(3)
        for path, data in sorted((tree or {}).items()):
            parent, name = self._parent(path)
            node = Folder() if data is None else File(data, data)
            parent.names[name] = parent.synced[name] = self.at[path] = node

    def make_folder(self, path: str) -> None:
        self._add(path, Folder())
        self.changed("make_folder")

    def create(self, path: str) -> int:
        file = File()
        self._add(path, file)
        handle = next(self._handle_numbers)
        self._handles[handle] = file
        self.changed("create")
        return handle

    def write(self, handle: int, parts: Sequence[Buffer]) -> None:
        self._handles[handle].data += b"".join(parts)
        self.changed("write")

    def sync(self, handle: int) -> None:
        file = self._handles[handle]
        if self._sync_counts(file.synced != file.data):
            file.synced = file.data
        self.changed("sync")

    def close(self, handle: int) -> None:
        del self._handles[handle]

    def link(self, source: str, target: str) -> None:
        self._add(target, self._file(source))
        self.changed("link")

    def unlink(self, path: str) -> None:
        self._file(path)
        parent, name = self._parent(path)
        del parent.names[name]
        del self.at[path]
        self.changed("unlink")

    def sync_folder(self, path: str) -> None:
        folder = self._folder(path)
        new = any(folder.synced.get(name) is not node for name, node in folder.names.items())
        if self._sync_counts(new) and path != self.deaf_folder:
            folder.synced = dict(folder.names)
        self.changed("sync_folder")

    def read(self, path: str, start: int = 0, end: int | None = None) -> memoryview:
        return memoryview(bytearray(self._file(path).data[start:end]))

    def size(self, path: str) -> int:
        node = self._node(path)
        return len(node.data) if isinstance(node, File) else 0

    def modified_unix_seconds(self, path: str) -> float:
        self._node(path)
        return 0.0

    def names(self, path: str) -> list[tuple[str, bool]]:
        return [(name, isinstance(node, Folder)) for name, node in self._folder(path).names.items()]

    def everything(self) -> Tree:
        """As a reader sees it now: no power cut."""
        return dict(_walk(self.root, "", lambda folder: folder.names, lambda file: file.data))

    def power_cut(self, source: random.Random, *, data: str, names: str) -> Tree:
        """One disk that a power cut may leave.

        Of unsynced bytes: `dropped`, `kept`, `torn` at any place, `zeros` or `garbage` in their length. Of unsynced
        names: `none` of the changes, `all`, `some`, or those that were `removed`.
        """

        def kept_names(folder: Folder) -> dict[str, Node]:
            if names == "removed":
                return {name: node for name, node in folder.synced.items() if folder.names.get(name) is node}
            if names != "some":
                return folder.synced if names == "none" else folder.names
            either = {**folder.synced, **folder.names}
            chosen = {name: source.choice((folder.synced, folder.names)).get(name) for name in sorted(either)}
            return {name: node for name, node in chosen.items() if node is not None}

        def kept_data(file: File) -> bytes:
            tail = file.data[len(file.synced) :]
            match data if tail else "kept":
                case "dropped":
                    tail = b""
                case "torn":
                    tail = tail[: source.randrange(len(tail) + 1)]
                case "zeros":
                    tail = bytes(len(tail))
                case "garbage":
                    tail = source.randbytes(len(tail))
            return file.synced + tail

        return dict(_walk(self.root, "", kept_names, kept_data))

    def _sync_counts(self, needed: bool) -> bool:
        self.syncs += 1
        counts = self.syncs - 1 != self._lost_sync
        self.lost |= needed and not counts
        return counts

    def _add(self, path: str, node: Node) -> None:
        parent, name = self._parent(path)
        if name in parent.names:
            raise FileExistsError(errno.EEXIST, path)
        parent.names[name] = self.at[path] = node

    def _parent(self, path: str) -> tuple[Folder, str]:
        folder, _, name = path.rpartition("/")
        return self._folder(folder), name

    def _node(self, path: str) -> Node:
        if path in self.at:
            return self.at[path]
        parent = path.rpartition("/")[0]
        if isinstance(self.at.get(parent), File):
            raise NotADirectoryError(errno.ENOTDIR, path)
        raise FileNotFoundError(errno.ENOENT, path)

    def _folder(self, path: str) -> Folder:
        node = self._node(path)
        if not isinstance(node, Folder):
            raise NotADirectoryError(errno.ENOTDIR, path)
        return node

    def _file(self, path: str) -> File:
        node = self._node(path)
        if not isinstance(node, File):
            raise IsADirectoryError(errno.EISDIR, path)
        return node


def _walk(
    folder: Folder, path: str, names: Callable[[Folder], dict[str, Node]], data: Callable[[File], bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names(folder).items():
        if isinstance(node, File):
            yield f"{path}/{name}", data(node)
        else:
            yield f"{path}/{name}", None
            yield from _walk(node, f"{path}/{name}", names, data)
