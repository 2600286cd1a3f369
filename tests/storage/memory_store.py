"""The object store contract in a dictionary, and a real store that can be looked at like it."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import cast

from kvstore_server.storage.store import Buffer, ObjectStore


class MemoryStore(ObjectStore):
    """Counts its calls by name in `calls`."""

    reads_at_once = 1

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.objects = {} if objects is None else objects
        self.calls: list[str] = []

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        self.calls.append("put_if_absent")
        if key in self.objects:
            return False
        self.objects[key] = b"".join(parts)
        return True

    def get(self, key: str) -> bytes:
        self.calls.append("get")
        return self.objects[key]

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.calls.append("get_range")
        return self.objects[key][start:end]

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        self.calls.append("list_keys")
        return sorted(key for key in self.objects if key.startswith(prefix + "/" * bool(prefix)) and key > start_after)

    def list_folders(self, prefix: str) -> list[str]:
        self.calls.append("list_folders")
        depth = len(prefix.split("/")) if prefix else 0
        paths = (key.split("/") for key in self.list_keys(prefix))
        return sorted({path[depth] for path in paths if len(path) > depth + 1})

    def size(self, key: str) -> int:
        self.calls.append("size")
        return len(self.objects[key])

    def delete(self, key: str) -> None:
        self.calls.append("delete")
        self.objects.pop(key, None)

    def probe(self) -> None:
        return


class Objects(MutableMapping[str, bytes]):
    """What lies in a store, by key; setting replaces, as only a test may."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def __getitem__(self, key: str) -> bytes:
        return bytes(self._store.get(key))

    def __setitem__(self, key: str, data: bytes) -> None:
        self._store.delete(key)
        assert self._store.put_if_absent(key, [data])

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._store.delete(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.list_keys(""))

    def __len__(self) -> int:
        return len(self._store.list_keys(""))


class CountedStore(MemoryStore):
    """A real store behind the same face."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(cast("dict[str, bytes]", Objects(store)))
        self.reads_at_once = store.reads_at_once
        self._store = store

    def put_if_absent(self, key: str, parts: Sequence[Buffer], *, urgent: bool = False) -> bool:
        self.calls.append("put_if_absent")
        return self._store.put_if_absent(key, parts, urgent=urgent)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.calls.append("get_range")
        return bytes(self._store.get_range(key, start, end))

    def list_keys(self, prefix: str, start_after: str = "") -> list[str]:
        self.calls.append("list_keys")
        return self._store.list_keys(prefix, start_after)

    def list_folders(self, prefix: str) -> list[str]:
        self.calls.append("list_folders")
        return self._store.list_folders(prefix)

    def size(self, key: str) -> int:
        self.calls.append("size")
        return self._store.size(key)

    def delete(self, key: str) -> None:
        self.calls.append("delete")
        self._store.delete(key)
