"""The seam to whatever keeps objects: immutable, written once, named by path-like keys."""

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Staged(Protocol):
    """An object that has no name yet. It is put at most once; one that is not put is discarded."""

    size: int

    def put_if_absent(self, key: str) -> bool:
        """As the store's."""
        ...

    def discard(self) -> None: ...


class ObjectStore(Protocol):
    """Keys are `/`-separated; objects are never overwritten, so a successful put is a commit.

    Raises kvstore_server.errors: ResourceExhausted (DISK_FULL) when nothing was written, Unavailable when the outcome
    is unknown. Blocking: callers run it in a worker thread; several may call at a time.
    """

    reads_at_once: int
    """How many reads at a time are quicker than one after another."""

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        """Durably creates `key` from the concatenated parts; False, changing nothing, if it exists already.

        Small `urgent` objects (deletes) may use space that a full disk keeps for them.
        True means: fsynced (data, name and every new folder) or acknowledged by the object store.
        """
        ...

    def stage(self, parts: Sequence[Buffer]) -> Staged:
        """What will be an object, durably written before its name is decided if this store can do that."""
        return NotStaged(self, parts)

    def get(self, key: str) -> bytes | memoryview:
        """The whole object; KeyError if there is none. Before an object is first served its folder is fsynced."""
        ...

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """Bytes [start, end), shorter at the object's end; KeyError if there is none."""
        ...

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        """Keys below the folder `prefix` (recursively) that sort after `start_after`, sorted."""
        ...

    def list_folders(self, prefix: str) -> list[str]:
        """Names of the folders directly below the folder `prefix`, sorted."""
        ...

    def size(self, key: str) -> int:
        """Bytes of the object; KeyError if there is none."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; nothing happens if there is none."""
        ...

    def probe(self) -> None:
        """Proves that a second create of one name is refused; raises Unavailable if the store does not keep that."""
        ...


class NotStaged:
    """Keeps the parts until the name is known."""

    def __init__(self, store: ObjectStore, parts: Sequence[Buffer]) -> None:
        self._store, self._parts = store, parts
        self.size = sum(map(len, parts))

    def put_if_absent(self, key: str) -> bool:
        return self._store.put_if_absent(key, self._parts)

    def discard(self) -> None:
        return
